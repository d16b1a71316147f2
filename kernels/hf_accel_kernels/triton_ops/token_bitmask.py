"""Token masks as a Triton kernel: one program for a row and a block of the vocabulary. See `token_bitmask.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 4096  # logits of a program
NUM_WARPS = 4


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, mask_rows: torch.Tensor | None) -> None:
    """`token_bitmask.apply_token_bitmask`; validates nothing."""
    num_rows, vocab_size = logits.shape
    launch(
        _bitmask_kernel,
        (num_rows, triton.cdiv(vocab_size, BLOCK)),
        logits,
        bitmask,
        bitmask if mask_rows is None else mask_rows,
        logits.stride(0),
        bitmask.stride(0),
        vocab_size,
        bitmask.shape[1],
        HAS_ROWS=mask_rows is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _bitmask_kernel(
    logits_ptr,
    bitmask_ptr,
    mask_rows_ptr,
    logits_stride,
    bitmask_stride,
    vocab_size,
    num_words,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mask_row = row
    if HAS_ROWS:
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
        if mask_row < 0:
            return
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bitmask_ptr + mask_row * bitmask_stride + tokens // 32, mask=tokens // 32 < num_words, other=0)
    forbidden = ((words >> (tokens % 32)) & 1) == 0
    target = logits_ptr + row * logits_stride + tokens
    tl.store(
        target, tl.full([BLOCK], -float("inf"), logits_ptr.dtype.element_ty), mask=forbidden & (tokens < vocab_size)
    )
