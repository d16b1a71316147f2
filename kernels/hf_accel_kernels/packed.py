"""Linear layers over packed weights on CPU (`cpu/gemm.cpp`): a second copy of the weights, laid out for one sequential read.

Owns the packed copies. Knows tensors only: not which model they came from nor when they change (call `repack`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Literal

import torch

from hf_accel_kernels.cpu import library
from hf_accel_kernels.cpu.abi import DTYPES, EPILOGUES, LinearArgs, fused_library


class PackedLinear:
    """Weights [N_i, K] side by side as one packed weight; `layout="interleaved"` holds exactly two of equal shape (gate, up).

    The packed bytes belong to this object and keep their address over `repack`.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None] | None = None,
        layout: Literal["concat", "interleaved"] = "concat",
    ) -> None:
        lib = fused_library()
        if lib is None:
            raise RuntimeError(f"the CPU ops are not available: {library.load()[1]}")
        first = weights[0]
        if first.dtype not in DTYPES:
            raise ValueError(f"packed linears hold float32 or bfloat16, not {first.dtype}")
        if layout == "interleaved" and (len(weights) != 2 or weights[0].shape != weights[1].shape):
            raise ValueError("an interleaved packed linear needs two weights of one shape: gate and up")
        self.dtype, self.layout = first.dtype, layout
        self.rows = [w.shape[0] for w in weights]
        self.num_columns, self.depth = sum(self.rows), first.shape[1]
        biases = [None] * len(weights) if biases is None else biases
        self.with_bias = any(bias is not None for bias in biases)
        handle = lib.hfa_packed_create(self.num_columns, self.depth, DTYPES[self.dtype], self.with_bias)
        if not handle:
            raise MemoryError(f"no memory for a packed weight of {self.num_columns} x {self.depth}")
        self.handle: int = handle
        self._release = weakref.finalize(self, lib.hfa_packed_destroy, handle)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self.repack(index, weight, bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed copy."""
        lib = fused_library()
        assert lib is not None
        return int(lib.hfa_packed_bytes(self.handle))

    def repack(self, index: int, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copy weight number `index` (and its bias) again, in place.

        Raises:
            ValueError: the shape or dtype is not the one packed before, or there is a bias and was none.
        """
        lib = fused_library()
        assert lib is not None
        if weight.shape != (self.rows[index], self.depth) or weight.dtype != self.dtype:
            raise ValueError(
                f"expected a weight of shape {(self.rows[index], self.depth)} and {self.dtype}, "
                f"got {tuple(weight.shape)} and {weight.dtype}"
            )
        if bias is not None and not self.with_bias:
            raise ValueError("packed without a bias: pack the linear anew")
        weight = weight.detach()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        bias = None if bias is None else bias.detach().to(self.dtype).contiguous()
        if self.layout == "interleaved":
            half = lib.hfa_panel_columns() // 2
            first, group, group_stride = index * half, half, 2 * half
        else:
            first, group, group_stride = sum(self.rows[:index]), self.rows[index], self.rows[index]
        lib.hfa_pack_weight(
            self.handle, weight.data_ptr(), weight.stride(0), self.rows[index], first, group, group_stride,
            None if bias is None else bias.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def pack(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] | None = None) -> PackedLinear:
    """Weights [N_i, K] (float32 or bfloat16) packed side by side."""
    return PackedLinear(weights, biases)


def packed_linear(
    x: torch.Tensor,
    packed: PackedLinear,
    *,
    epilogue: Literal["plain", "silu_mul"] = "plain",
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    """epilogue(x W^T + bias) * scale + residual, accumulated in float32.

    Args:
        x: [M, K] of the packed dtype, last dimension contiguous.
        epilogue: "silu_mul" (interleaved weights only) gives silu(gate) * up, [M, N / 2].
        residual: [M, N] (or [M, N / 2]) of the packed dtype.
        out_dtype: the packed dtype (default) or torch.float32, which keeps the unrounded sums.
        num_threads: OpenMP threads; torch's own number by default.

    Returns:
        [M, N] or [M, N / 2].

    Raises:
        ValueError: shapes, dtypes or layout do not fit.
    """
    lib = fused_library()
    assert lib is not None
    if x.dim() != 2 or x.shape[1] != packed.depth or x.dtype != packed.dtype:
        raise ValueError(f"expected x [M, {packed.depth}] of {packed.dtype}, got {tuple(x.shape)} of {x.dtype}")
    if (epilogue == "silu_mul") and packed.layout != "interleaved":
        raise ValueError("silu_mul needs a packed linear with layout='interleaved'")
    if epilogue == "plain" and packed.layout == "interleaved":
        raise ValueError("an interleaved packed linear has only the silu_mul epilogue")
    out_dtype = packed.dtype if out_dtype is None else out_dtype
    if out_dtype not in (packed.dtype, torch.float32):
        raise ValueError(f"out_dtype must be {packed.dtype} or float32, not {out_dtype}")
    x = x if x.stride(1) == 1 else x.contiguous()
    columns = packed.num_columns // 2 if epilogue == "silu_mul" else packed.num_columns
    out = torch.empty(x.shape[0], columns, dtype=out_dtype)
    if residual is not None:
        if residual.shape != out.shape or residual.dtype != packed.dtype:
            raise ValueError(f"expected a residual {tuple(out.shape)} of {packed.dtype}")
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    args = LinearArgs(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        num_rows=x.shape[0],
        out=out.data_ptr(),
        out_stride=out.stride(0),
        residual=None if residual is None else residual.data_ptr(),
        residual_stride=0 if residual is None else residual.stride(0),
        scale=scale,
        epilogue=EPILOGUES[epilogue],
        out_float32=out_dtype == torch.float32,
        keep_float32=1,
        num_threads=torch.get_num_threads() if num_threads is None else num_threads,
    )
    lib.hfa_packed_linear(packed.handle, ctypes.byref(args))
    return out
