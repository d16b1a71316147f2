"""Two parts of an attention merged: one program for a token and a block of heads. See `merge_state.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 4096  # values of a program


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_state.merge_state`; validates nothing."""
    num_tokens, num_heads, dim = out_a.shape
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    block_d = triton.next_power_of_2(dim)
    block_h = max(1, min(triton.next_power_of_2(num_heads), BLOCK // block_d))
    launch(
        _merge_kernel,
        (num_tokens, triton.cdiv(num_heads, block_h)),
        out_a,
        lse_a,
        out_b,
        lse_b,
        out,
        lse,
        num_heads,
        *out_a.stride()[:2],
        *lse_a.stride(),
        *out_b.stride()[:2],
        *lse_b.stride(),
        DIM=dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out, lse


@triton.jit
def _merge_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_heads,
    a_token_stride,
    a_head_stride,
    lse_a_token_stride,
    lse_a_head_stride,
    b_token_stride,
    b_head_stride,
    lse_b_token_stride,
    lse_b_head_stride,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    held = heads < num_heads
    dims = tl.arange(0, BLOCK_D)
    keep = held[:, None] & (dims[None, :] < DIM)
    lse_a = tl.load(lse_a_ptr + token * lse_a_token_stride + heads * lse_a_head_stride, mask=held, other=0.0)
    lse_b = tl.load(lse_b_ptr + token * lse_b_token_stride + heads * lse_b_head_stride, mask=held, other=0.0)
    a = tl.load(
        out_a_ptr + token * a_token_stride + heads[:, None] * a_head_stride + dims[None, :], mask=keep, other=0.0
    )
    b = tl.load(
        out_b_ptr + token * b_token_stride + heads[:, None] * b_head_stride + dims[None, :], mask=keep, other=0.0
    )
    peak = tl.maximum(lse_a, lse_b)
    finite = tl.where(peak == -float("inf"), 0.0, peak)  # neither has keys
    weight_a = tl.exp(lse_a - finite)
    weight_b = tl.exp(lse_b - finite)
    total = weight_a + weight_b
    some = tl.where(total == 0.0, 1.0, total)
    merged = a.to(tl.float32) * (weight_a / some)[:, None] + b.to(tl.float32) * (weight_b / some)[:, None]
    rows = token * num_heads + heads
    tl.store(out_ptr + rows[:, None] * DIM + dims[None, :], merged.to(out_ptr.dtype.element_ty), mask=keep)
    tl.store(lse_ptr + rows, tl.where(total == 0.0, -float("inf"), finite + tl.log(some)), mask=held)
