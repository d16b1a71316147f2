"""Rows that stand in token automata: the mask of each, and where a token leads it. The typed contract, its checks, and which form
computes it.

Structured output keeps one arena of automata; a row of logits has a state in it. Knows tensors only.

A row's state is one int64: the id of an arena state in its low 32 bits, a count in its high ones. State 0 is the end, which no token leads
out of; a negative number is a row without an automaton, and stays what it is.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .cpu import library
from .triton_ops.launch import why_not

COUNT_SHIFT = 32
NO_MASK = -1
FIELDS = 7
"""Of an arena state, int64 each: its row of `classes`, its first entry of `moves`, and base, low, low_span, high, high_span: for a count
its entry of `rows` is base + clip(count - low, 0, low_span) + clip(count - high, 0, high_span)."""


def mask_rows(states: torch.Tensor, arena_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[num_rows] int32: the mask that each row must obey, NO_MASK for rows without an automaton. No host sync.

    Args:
        states: [num_rows] int64; every id is one of the arena's.
        arena_states: [num_states, FIELDS] int64, contiguous.
        rows: [num_mask_rows] int32, contiguous: masks.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_states(states, arena_states)
    _check_table("rows", rows, torch.int32, 1, rows.shape)
    device = states.device
    if not why_not(device):
        from .triton_ops import token_states

        return token_states.mask_rows(states, arena_states, rows)
    lib = _native() if _all_on_cpu(states, arena_states, rows) else None
    if lib is None:
        return _mask_rows_in_torch(states, arena_states, rows)
    out = torch.empty(states.shape[0], dtype=torch.int32)
    lib.hfa_token_mask_rows(
        *(states.data_ptr(), states.stride(0), states.shape[0]),
        *(arena_states.data_ptr(), rows.data_ptr(), out.data_ptr()),
    )
    return out


def advance(
    states: torch.Tensor,
    token_ids: torch.Tensor,
    arena_states: torch.Tensor,
    classes: torch.Tensor,
    moves: torch.Tensor,
) -> torch.Tensor:
    """[num_rows] int64: the states after a token each. No host sync.

    Args:
        states: [num_rows] int64; every id is one of the arena's.
        token_ids: [num_rows] int64; one past the end of `classes` counts as the last one, one below 0 as the first.
        arena_states: [num_states, FIELDS] int64, contiguous.
        classes: [num_automata, vocab_size] int32, contiguous: kinds of tokens.
        moves: [num_moves, 2] int32, contiguous, by state and class: the id of the next state, and 2 * n for n more to the count or
            2 * n + 1 for a count of n.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_states(states, arena_states)
    if token_ids.shape != states.shape or token_ids.dtype != torch.int64:
        raise ValueError(
            f"token_ids must be int64 {list(states.shape)}, got {tuple(token_ids.shape)} {token_ids.dtype}"
        )
    _check_table("classes", classes, torch.int32, 2, classes.shape)
    _check_table("moves", moves, torch.int32, 2, (moves.shape[0], 2))
    device = states.device
    if not why_not(device):
        from .triton_ops import token_states

        return token_states.advance(states, token_ids, arena_states, classes, moves)
    lib = _native() if _all_on_cpu(states, token_ids, arena_states, classes, moves) else None
    if lib is None:
        return _advance_in_torch(states, token_ids, arena_states, classes, moves)
    out = torch.empty(states.shape[0], dtype=torch.int64)
    lib.hfa_token_advance(
        *(states.data_ptr(), states.stride(0), token_ids.data_ptr(), token_ids.stride(0), states.shape[0]),
        *(arena_states.data_ptr(), classes.data_ptr(), classes.shape[1], moves.data_ptr(), out.data_ptr()),
    )
    return out


@functools.cache
def _native() -> ctypes.CDLL | None:
    lib, _ = library.load()
    if lib is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    lib.hfa_token_mask_rows.argtypes = (pointer, size, size, pointer, pointer, pointer)
    lib.hfa_token_advance.argtypes = (pointer, size, pointer, size, size, pointer, pointer, size, pointer, pointer)
    lib.hfa_token_mask_rows.restype = lib.hfa_token_advance.restype = None
    return lib


def _all_on_cpu(*tensors: torch.Tensor) -> bool:
    return all(t.device.type == "cpu" for t in tensors)


def _check_states(states: torch.Tensor, arena_states: torch.Tensor) -> None:
    if states.ndim != 1 or states.dtype != torch.int64:
        raise ValueError(f"states must be int64 [num_rows], got {tuple(states.shape)} {states.dtype}")
    _check_table("arena_states", arena_states, torch.int64, 2, (arena_states.shape[0], FIELDS))


def _check_table(name: str, table: torch.Tensor, dtype: torch.dtype, ndim: int, shape: tuple[int, ...]) -> None:
    if table.ndim != ndim or table.shape != shape or table.dtype != dtype or not table.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, got {tuple(table.shape)} {table.dtype}")


def _mask_rows_in_torch(states: torch.Tensor, arena_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    count, known = states >> COUNT_SHIFT, _known(states, arena_states)
    _, _, base, low, low_span, high, high_span = known.unbind(1)
    near_low = torch.minimum((count - low).clamp(min=0), low_span)
    row = base + near_low + torch.minimum((count - high).clamp(min=0), high_span)
    return torch.where(states >= 0, rows[row], NO_MASK)


def _advance_in_torch(
    states: torch.Tensor,
    token_ids: torch.Tensor,
    arena_states: torch.Tensor,
    classes: torch.Tensor,
    moves: torch.Tensor,
) -> torch.Tensor:
    known = _known(states, arena_states)
    symbols = classes[known[:, 0], token_ids.clamp(0, classes.shape[1] - 1)]
    target, step = moves[known[:, 1] + symbols].long().unbind(1)
    count = torch.where(step & 1 == 1, 0, states >> COUNT_SHIFT) + (step >> 1)
    return torch.where(states > 0, target + (count << COUNT_SHIFT), states)


def _known(states: torch.Tensor, arena_states: torch.Tensor) -> torch.Tensor:
    return arena_states[states.clamp(min=0) & ((1 << COUNT_SHIFT) - 1)]  # [num_rows, FIELDS]
