"""Argmax and log-probabilities as Triton kernels: a row by blocks, so that one row fills the chip too. See `sampling.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .row_scores import load_scores, mask_arguments

BLOCK = 4096  # logits of a program, a multiple of 32


def argmax(
    logits: torch.Tensor, bitmask: torch.Tensor | None, mask_rows: torch.Tensor | None, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sampling.argmax`; validates nothing."""
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, block)
    highest = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    firsts = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    valid = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    launch(
        _block_argmax_kernel, (num_rows, num_blocks), logits, *mask_arguments(logits, bitmask, mask_rows), highest, firsts,
        logits.stride(0), vocab_size, HAS_MASK=bitmask is not None, HAS_MASK_ROWS=mask_rows is not None, BLOCK=block,
    )  # fmt: skip
    launch(
        _argmax_kernel, (num_rows,), highest, firsts, token_ids, valid, num_blocks,
        NUM_BLOCKS=triton.next_power_of_2(num_blocks), num_warps=1,
    )  # fmt: skip
    return token_ids, valid


def logprobs(logits: torch.Tensor, token_ids: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `token_ids`, and the log of the sum of exponentials, both [num_rows] float32; validates nothing."""
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, block)
    highest = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    sums, own = torch.empty_like(highest), torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    log_total = torch.empty_like(own)
    launch(_block_sum_kernel, (num_rows, num_blocks), logits, highest, sums, logits.stride(0), vocab_size, BLOCK=block)
    launch(
        _logprob_kernel, (num_rows,), logits, token_ids, highest, sums, own, log_total, logits.stride(0), num_blocks,
        NUM_BLOCKS=triton.next_power_of_2(num_blocks), num_warps=1,
    )  # fmt: skip
    return own, log_total


@triton.jit
def _block_argmax_kernel(
    logits_ptr, bitmask_ptr, bitmask_stride, num_words, mask_rows_ptr, highest_ptr, firsts_ptr, logits_stride, vocab_size,
    HAS_MASK: tl.constexpr, HAS_MASK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Highest logit of a block, NaN if there is one, and where it is first."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mask_row = row
    if HAS_MASK_ROWS:
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
    groups = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    scores, tokens = load_scores(
        logits_ptr + row * logits_stride, bitmask_ptr + mask_row * bitmask_stride, mask_row >= 0, groups, groups >= 0, 1.0,
        vocab_size, num_words, HAS_MASK, 32,
    )  # fmt: skip
    is_nan = scores != scores
    scores = tl.where(is_nan, -float("inf"), scores)
    highest = tl.max(scores)
    entry = row * tl.num_programs(1) + block
    tl.store(highest_ptr + entry, tl.where(tl.max(is_nan.to(tl.int32)) > 0, float("nan"), highest))
    tl.store(firsts_ptr + entry, tl.min(tl.where(scores == highest, tokens, 0x7FFFFFFF)))


@triton.jit
def _argmax_kernel(highest_ptr, firsts_ptr, token_ids_ptr, valid_ptr, num_blocks, NUM_BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, NUM_BLOCKS)
    entries = row * num_blocks + blocks
    maxima = tl.load(highest_ptr + entries, mask=blocks < num_blocks, other=-float("inf"))
    firsts = tl.load(firsts_ptr + entries, mask=blocks < num_blocks, other=0x7FFFFFFF)
    is_nan = maxima != maxima
    highest = tl.max(tl.where(is_nan, -float("inf"), maxima), axis=0)
    valid = (tl.max(is_nan.to(tl.int32), axis=0) == 0) & (highest > -float("inf"))
    first = tl.min(tl.where(maxima == highest, firsts, 0x7FFFFFFF), axis=0)
    tl.store(token_ids_ptr + row, tl.where(valid, first, 0).to(tl.int64))
    tl.store(valid_ptr + row, valid)


@triton.jit
def _block_sum_kernel(logits_ptr, highest_ptr, sums_ptr, logits_stride, vocab_size, BLOCK: tl.constexpr):
    """Highest logit of a block, and the sum of exponentials over that of it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=tokens < vocab_size, other=-float("inf"))
    logits = logits.to(tl.float32)
    highest = tl.max(logits, axis=0)
    base = tl.where(highest > -float("inf"), highest, 0.0)
    entry = row * tl.num_programs(1) + block
    tl.store(highest_ptr + entry, highest)
    tl.store(sums_ptr + entry, tl.sum(tl.exp(logits - base), axis=0))


@triton.jit
def _logprob_kernel(
    logits_ptr, token_ids_ptr, highest_ptr, sums_ptr, own_ptr, log_total_ptr, logits_stride, num_blocks,
    NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, NUM_BLOCKS)
    maxima = tl.load(highest_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=-float("inf"))
    sums = tl.load(sums_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
    highest = tl.max(maxima, axis=0)
    log_total = highest + tl.log(tl.sum(sums * tl.exp(maxima - highest), axis=0))
    logit = tl.load(logits_ptr + row * logits_stride + tl.load(token_ids_ptr + row)).to(tl.float32)
    tl.store(own_ptr + row, logit - log_total)
    tl.store(log_total_ptr + row, log_total)
