"""RMSNorm as a Triton kernel: one program for a row, which stays in registers. See `rms_norm.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

VALUES_PER_WARP = 1024  # of a row's block: 32 a thread
MOST_WARPS = 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm.rms_norm`; validates nothing."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, out, eps, 1.0, add=False)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm.add_rms_norm`; validates nothing."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, out, total, eps, scale, add=True)
    return out, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    scale: float,
    *,
    add: bool,
) -> None:
    num_tokens, size = x.shape
    block = triton.next_power_of_2(max(1, size))
    launch(
        _rms_norm_kernel,
        (num_tokens,),
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        residual.stride(0),
        size,
        eps,
        scale,
        ADD=add,
        SCALED=scale != 1.0,
        BLOCK=block,
        num_warps=min(MOST_WARPS, max(1, block // VALUES_PER_WARP)),
    )


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    size,
    eps,
    scale,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            x = (x * scale).to(dtype).to(tl.float32)
        total = (residual + x).to(dtype)
        tl.store(total_ptr + row * size + columns, total, mask=mask)
        x = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    normed = (x * factor).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (weight * normed).to(dtype), mask=mask)
