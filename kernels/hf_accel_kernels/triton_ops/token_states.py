"""Rows in token automata as Triton kernels: one lane for a row. See `token_states.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 64  # rows of a program
NUM_WARPS = 2


def mask_rows(states: torch.Tensor, arena_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`token_states.mask_rows`; validates nothing."""
    num_rows = states.shape[0]
    out = torch.empty(num_rows, dtype=torch.int32, device=states.device)
    launch(
        _mask_rows_kernel,
        (triton.cdiv(num_rows, BLOCK),),
        states,
        arena_states,
        rows,
        out,
        states.stride(0),
        num_rows,
        FIELDS=arena_states.shape[1],
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return out


def advance(
    states: torch.Tensor,
    token_ids: torch.Tensor,
    arena_states: torch.Tensor,
    classes: torch.Tensor,
    moves: torch.Tensor,
) -> torch.Tensor:
    """`token_states.advance`; validates nothing."""
    num_rows = states.shape[0]
    out = torch.empty(num_rows, dtype=torch.int64, device=states.device)
    launch(
        _advance_kernel,
        (triton.cdiv(num_rows, BLOCK),),
        states,
        token_ids,
        arena_states,
        classes,
        moves,
        out,
        states.stride(0),
        token_ids.stride(0),
        num_rows,
        classes.shape[1],
        FIELDS=arena_states.shape[1],
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return out


@triton.jit
def _mask_rows_kernel(
    states_ptr,
    arena_ptr,
    rows_ptr,
    out_ptr,
    states_stride,
    num_rows,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(states_ptr + row * states_stride, mask=row < num_rows, other=-1)
    constrained = state >= 0
    count = state >> 32
    known = arena_ptr + (state & 0xFFFFFFFF) * FIELDS
    base = tl.load(known + 2, mask=constrained, other=0)
    low = tl.load(known + 3, mask=constrained, other=0)
    low_span = tl.load(known + 4, mask=constrained, other=0)
    high = tl.load(known + 5, mask=constrained, other=0)
    high_span = tl.load(known + 6, mask=constrained, other=0)
    near_low = tl.minimum(tl.maximum(count - low, 0), low_span)
    near_high = tl.minimum(tl.maximum(count - high, 0), high_span)
    mask_row = tl.load(rows_ptr + base + near_low + near_high, mask=constrained, other=-1)
    tl.store(out_ptr + row, mask_row, mask=row < num_rows)


@triton.jit
def _advance_kernel(
    states_ptr,
    token_ids_ptr,
    arena_ptr,
    classes_ptr,
    moves_ptr,
    out_ptr,
    states_stride,
    token_ids_stride,
    num_rows,
    vocab_size,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(states_ptr + row * states_stride, mask=row < num_rows, other=-1)
    moving = state > 0
    token = tl.load(token_ids_ptr + row * token_ids_stride, mask=moving, other=0)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    known = arena_ptr + (state & 0xFFFFFFFF) * FIELDS
    automaton = tl.load(known, mask=moving, other=0)
    first_move = tl.load(known + 1, mask=moving, other=0)
    symbol = tl.load(classes_ptr + automaton * vocab_size + token, mask=moving, other=0)
    move = moves_ptr + 2 * (first_move + symbol)
    target = tl.load(move, mask=moving, other=0).to(tl.int64)
    step = tl.load(move + 1, mask=moving, other=0).to(tl.int64)
    count = tl.where(step & 1 == 1, 0, state >> 32) + (step >> 1)
    tl.store(out_ptr + row, tl.where(moving, target + (count << 32), state), mask=row < num_rows)
