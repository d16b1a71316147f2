"""Rows in token automata: the kernels, the C++ and the torch form against the oracle."""

from __future__ import annotations

import pytest
import torch

from hf_accel_kernels import reference_token_states as reference
from hf_accel_kernels import token_states
from hf_accel_kernels.triton_ops import token_states as kernel

FORMS = {
    "kernel": (kernel.mask_rows, kernel.advance),
    "torch": (token_states._mask_rows_in_torch, token_states._advance_in_torch),
    "dispatched": (token_states.mask_rows, token_states.advance),
}


def random_arena(num_states: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """States with their own moves and rows, of some automata with 5 classes of tokens; state 0 is the end."""
    num_classes, automata = 5, 3
    spans = torch.randint(0, 4, (num_states, 2))
    bounds = torch.randint(-3, 9, (num_states, 2))
    sizes = spans.sum(dim=1) + 1
    moves = torch.stack(
        [torch.randint(0, num_states, (num_states * num_classes,)), torch.randint(0, 9, (num_states * num_classes,))], 1
    )
    columns = [
        torch.randint(0, automata, (num_states,)),
        torch.arange(num_states) * num_classes,
        sizes.cumsum(0) - sizes,
    ]
    states = torch.stack([*columns, bounds[:, 0], spans[:, 0], bounds[:, 1], spans[:, 1]], dim=1)
    return {
        "arena_states": states,
        "rows": torch.randint(0, 1000, (int(sizes.sum()),), dtype=torch.int32),
        "classes": torch.randint(0, num_classes, (automata, vocab_size), dtype=torch.int32),
        "moves": moves.to(torch.int32),
    }


def random_states(num_rows: int, num_states: int) -> torch.Tensor:
    states = torch.randint(0, num_states, (num_rows,)) + (torch.randint(0, 14, (num_rows,)) << 32)
    special = torch.randint(0, 4, (num_rows,))
    return torch.where(special == 0, -1, torch.where(special == 1, 0, states))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_rows", "num_states", "vocab_size"), [(1, 2, 1), (5, 30, 37), (131, 7, 301), (64, 3, 64)])
@pytest.mark.parametrize("strided", [True, False])
def test_rows_find_their_masks_and_go_on(form, num_rows, num_states, vocab_size, strided, device):
    arena = random_arena(num_states, vocab_size)
    states, tokens = random_states(num_rows, num_states), torch.randint(-2, vocab_size + 3, (num_rows,))
    if strided:
        states, tokens = (torch.stack([t + 1, t, t - 1], dim=1)[:, 1] for t in (states, tokens))
    moved = {name: table.to(device) for name, table in arena.items()}
    find, advance = FORMS[form]
    masks = find(states.to(device), moved["arena_states"], moved["rows"])
    assert masks.dtype == torch.int32
    assert torch.equal(masks.cpu(), reference.mask_rows(states, arena["arena_states"], arena["rows"]))
    tables = ("arena_states", "classes", "moves")
    after = advance(states.to(device), tokens.to(device), *(moved[t] for t in tables))
    assert torch.equal(after.cpu(), reference.advance(states, tokens, *(arena[t] for t in tables)))


def test_no_rows():
    arena, none = random_arena(3, 8), torch.zeros(0, dtype=torch.int64)
    assert token_states.mask_rows(none, arena["arena_states"], arena["rows"]).shape == (0,)
    assert token_states.advance(none, none, arena["arena_states"], arena["classes"], arena["moves"]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("states", torch.zeros(2, dtype=torch.int32)),
        ("states", torch.zeros(2, 1, dtype=torch.int64)),
        ("token_ids", torch.zeros(3, dtype=torch.int64)),
        ("token_ids", torch.zeros(2, dtype=torch.int32)),
        ("arena_states", torch.zeros(3, 6, dtype=torch.int64)),
        ("classes", torch.zeros(8, 3, dtype=torch.int32).T),
        ("moves", torch.zeros(15, 2, dtype=torch.int64)),
        ("rows", torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_bad_input_is_refused(name, wrong):
    given = {"states": torch.zeros(2, dtype=torch.int64), "token_ids": torch.zeros(2, dtype=torch.int64)}
    given |= random_arena(3, 8) | {name: wrong}
    names = ("states", "token_ids", "arena_states", "classes", "moves")
    call = token_states.advance
    if name == "rows":
        names, call = ("states", "arena_states", "rows"), token_states.mask_rows
    with pytest.raises(ValueError, match=f"{name} must be"):
        call(*(given[n] for n in names))
