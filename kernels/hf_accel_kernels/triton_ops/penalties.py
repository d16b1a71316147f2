"""Penalties and their counts as Triton kernels. See `penalties.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 1024  # logits of a program
NUM_IDS = 128  # token ids of a program

_MOST = tl.constexpr(0x7FFF)  # `penalties.MOST`


def count_tokens(table: torch.Tensor, table_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """`penalties.count_tokens`; validates nothing."""
    num_rows = token_ids.shape[0]
    grid = (triton.cdiv(num_rows, NUM_IDS),)
    launch(_count_kernel, grid, table, table_rows, token_ids, num_rows, table.shape[1], BLOCK=NUM_IDS)


def apply_penalties(
    logits: torch.Tensor,
    table: torch.Tensor,
    table_rows: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """`penalties.apply_penalties`; validates nothing."""
    num_rows, vocab_size = logits.shape
    launch(
        _penalty_kernel, (num_rows, triton.cdiv(vocab_size, BLOCK)), logits, table, table_rows, repetition, presence, frequency,
        logits.stride(0), vocab_size, BLOCK=BLOCK,
    )  # fmt: skip


def add_to_logits(logits: torch.Tensor, token_ids: torch.Tensor, values: torch.Tensor) -> None:
    """`penalties.add_to_logits`; validates nothing."""
    (num_rows, num_ids), vocab_size = token_ids.shape, logits.shape[1]
    grid = (num_rows, triton.cdiv(num_ids, NUM_IDS))
    launch(_add_kernel, grid, logits, token_ids, values, logits.stride(0), vocab_size, num_ids, BLOCK=NUM_IDS)


@triton.jit
def _count_kernel(table_ptr, table_rows_ptr, token_ids_ptr, num_rows, vocab_size, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    table_rows = tl.load(table_rows_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    tokens = tl.load(token_ids_ptr + rows, mask=rows < num_rows, other=-1)
    counted = (table_rows >= 0) & (tokens >= 0) & (tokens < vocab_size)
    entry = table_ptr + table_rows * vocab_size + tokens
    entries = tl.load(entry, mask=counted, other=0).to(tl.int32)
    tl.store(entry, (entries + 1).to(tl.int16), mask=counted & ((entries & _MOST) < _MOST))


@triton.jit
def _penalty_kernel(
    logits_ptr, table_ptr, table_rows_ptr, repetition_ptr, presence_ptr, frequency_ptr, logits_stride, vocab_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads and writes only the logits of tokens that were seen."""
    row = tl.program_id(0).to(tl.int64)
    table_row = tl.load(table_rows_ptr + row).to(tl.int64)
    if table_row < 0:
        return
    repetition, presence = tl.load(repetition_ptr + row), tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entries = tl.load(table_ptr + table_row * vocab_size + tokens, mask=tokens < vocab_size, other=0).to(tl.int32)
    seen = entries != 0
    target = logits_ptr + row * logits_stride + tokens
    logits = tl.load(target, mask=seen, other=0.0)
    factor = tl.zeros_like(logits) + repetition
    logits = tl.where(logits < 0.0, logits * factor, tl.div_rn(logits, factor))
    num_output = (entries & _MOST).to(tl.float32)
    logits -= frequency * num_output + presence * (num_output > 0.0).to(tl.float32)
    tl.store(target, logits, mask=seen)


@triton.jit
def _add_kernel(logits_ptr, token_ids_ptr, values_ptr, logits_stride, vocab_size, num_ids, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(token_ids_ptr + row * num_ids + places, mask=places < num_ids, other=-1)
    means = (tokens >= 0) & (tokens < vocab_size)
    target = logits_ptr + row * logits_stride + tokens
    values = tl.load(values_ptr + row * num_ids + places, mask=means, other=0.0)
    tl.store(target, tl.load(target, mask=means, other=0.0) + values, mask=means)
