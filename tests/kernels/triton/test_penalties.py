"""Penalties: the kernels and the torch forms, fed token by token, against the oracle that has the rows' whole history."""

from __future__ import annotations

import random

import pytest
import torch

from hf_accel_kernels import penalties, reference_sampling
from hf_accel_kernels.triton_ops import penalties as kernels

FORMS = {
    "triton": (kernels.count_tokens, kernels.apply_penalties, kernels.add_to_logits),
    "torch": (penalties._count_in_torch, penalties._penalise_in_torch, penalties._add_in_torch),
    "op": (penalties.count_tokens, penalties.apply_penalties, penalties.add_to_logits),
}


def padded(rows: list[dict[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + 1  # always some padding
    ids = [[*row, *[-1] * (width - len(row))] for row in rows]
    values = [[*row.values(), *[7.0] * (width - len(row))] for row in rows]
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(values)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 5), (5, 37), (4, 5003)])
def test_rows_are_penalised_for_their_own_tokens(form, num_rows, vocab_size, device):
    count, apply, add = FORMS[form]
    rng = random.Random(num_rows)
    some_tokens = [
        rng.randrange(vocab_size + 2) for _ in range(6)
    ]  # few, so that they come again; some without a logit
    prompt = [[rng.choice(some_tokens) for _ in range(rng.randrange(1, 9))] for _ in range(num_rows)]
    output = [[rng.choice(some_tokens) for _ in range(10)] for _ in range(num_rows)]
    table = penalties.count_table(num_rows + 2, vocab_size, device)
    table.fill_(-3)  # what earlier sequences left
    table_rows = torch.randperm(num_rows + 2)[:num_rows].to(torch.int32)
    num_before = [rng.randrange(4) for _ in range(num_rows)]  # output tokens of a sequence that comes back
    for row in range(num_rows):
        penalties.start_counts(table, int(table_rows[row]), prompt[row], output[row][: num_before[row]])
    if num_rows > 1:
        table_rows[1] = -1  # without penalties
    untouched = table.clone()
    for step in range(10):
        rows = [-1 if step < num_before[i] else int(r) for i, r in enumerate(table_rows)]
        tokens = torch.tensor([tokens[step] for tokens in output])
        count(table, torch.tensor(rows, dtype=torch.int32).to(device), tokens.to(device))
    free = [r for r in range(num_rows + 2) if r not in table_rows.tolist()]
    assert torch.equal(table[free], untouched[free])

    repetition = torch.tensor([rng.choice([1.0, 0.7, 1.3]) for _ in range(num_rows)])
    presence = torch.tensor([rng.choice([0.0, 0.5, -1.0]) for _ in range(num_rows)])
    frequency = torch.tensor([rng.choice([0.0, 0.25, -2.0]) for _ in range(num_rows)])
    bias = [{rng.randrange(vocab_size): rng.uniform(-9, 9) for _ in range(i)} for i in range(num_rows)]
    banned = [rng.sample(range(vocab_size), i % 3) for i in range(num_rows)]
    logits = torch.randn(num_rows, vocab_size + 3)
    mine = logits.clone().to(device)[:, :vocab_size]
    add(mine, *(x.to(device) for x in padded(bias)))
    settings = [x.to(device) for x in (table_rows, repetition, presence, frequency)]
    apply(mine, table, *settings)
    add(mine, *(x.to(device) for x in padded([dict.fromkeys(row, -torch.inf) for row in banned])))

    off = [r < 0 for r in table_rows.tolist()]
    known = [[i for i in tokens if i < vocab_size] for tokens in prompt]
    generated = [[i for i in tokens if i < vocab_size] for tokens in output]
    expected = reference_sampling.edit_logits(
        logits[:, :vocab_size],
        [[] if skip else x for x, skip in zip(known, off)],
        [[] if skip else x for x, skip in zip(generated, off)],
        *(x.tolist() for x in (repetition, presence, frequency)),
        bias,
        banned,
    )
    torch.testing.assert_close(mine.cpu().double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_counts_stop_at_their_highest(form, device):
    table = penalties.count_table(1, 3, device)
    penalties.start_counts(table, 0, [1], [1] * 40000 + [0] * 2)
    assert table.tolist() == [[2, -1, 0]]  # all bits of the second
    FORMS[form][0](table, torch.zeros(1, dtype=torch.int32).to(device), torch.tensor([1]).to(device))
    FORMS[form][0](table, torch.zeros(1, dtype=torch.int32).to(device), torch.tensor([2]).to(device))
    assert table.tolist() == [[2, -1, 1]]


def test_bad_input_is_refused():
    logits, table, rows, ones = (
        torch.zeros(2, 8),
        penalties.count_table(3, 8, "cpu"),
        torch.zeros(2).int(),
        torch.ones(2),
    )
    with pytest.raises(ValueError, match="table must be contiguous"):
        penalties.apply_penalties(logits, table.int(), rows, ones, ones, ones)
    with pytest.raises(ValueError, match="table must have 8"):
        penalties.apply_penalties(logits, table[:, :7].contiguous(), rows, ones, ones, ones)
    with pytest.raises(ValueError, match="table_rows"):
        penalties.apply_penalties(logits, table, rows.long(), ones, ones, ones)
    with pytest.raises(ValueError, match="presence"):
        penalties.apply_penalties(logits, table, rows, ones, ones[:1], ones)
    with pytest.raises(ValueError, match="logits must be"):
        penalties.apply_penalties(logits.half(), table, rows, ones, ones, ones)
    with pytest.raises(ValueError, match="token_ids"):
        penalties.count_tokens(table, rows, rows)
    with pytest.raises(ValueError, match="token_ids"):
        penalties.add_to_logits(logits, torch.zeros(1, 2).int(), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="values"):
        penalties.add_to_logits(logits, torch.zeros(2, 2).int(), torch.zeros(2, 3))
