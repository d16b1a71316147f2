"""silu(gate) * up as a Triton kernel: one program for a row and a block of its columns. See `swiglu.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 1024  # columns of a program
NUM_WARPS = 4


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu.swiglu`; validates nothing."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_tokens, triton.cdiv(size, BLOCK))
    launch(_swiglu_kernel, grid, gate_up, out, gate_up.stride(0), size, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    source = gate_up_ptr + row * stride + columns
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (activated * up).to(dtype), mask=mask)
