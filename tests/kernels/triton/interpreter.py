"""Makes Triton's interpreter compute bf16 and take tensor bounds in `range`.

The interpreter keeps bf16 blocks as uint16 bit patterns and calculates on these, silently wrong; here such operands are
widened to float32 and results rounded back to nearest even. Triton 3.6 with numpy 2.4 or newer also refuses
`range(start, end)` on one-element arrays. Reaches into `triton.runtime.interpreter`: look here first when triton changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_COMPARISONS = {np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal}


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """A bf16 handle as float32; others as they are."""
    if not _is_bf16(handle) or handle.data.dtype != np.uint16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values: Any) -> Any:
    """Values as a bf16 handle."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def install() -> None:
    """Patch the interpreter, once a process, before the first kernel runs."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "computes_bf16", False):
        return
    builder.computes_bf16 = True
    _patch_operations(builder)
    _patch_reductions()
    _patch_index()


def _patch_operations(builder: Any) -> None:
    binary, unary, dot, cast = builder.binary_op, builder.unary_op, builder.create_dot, builder.cast_impl
    ternary = builder.ternary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not _is_bf16(lhs) and not _is_bf16(rhs):
            return binary(self, lhs, rhs, op)
        result = op(_widen(lhs).data, _widen(rhs).data)
        if op in _COMPARISONS or result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return _round(result)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _round(op(_widen(arg).data)) if _is_bf16(arg) else unary(self, arg, op)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.where or not any(map(_is_bf16, (lhs, rhs, other))):  # a choice moves bit patterns, rightly
            return ternary(self, lhs, rhs, other, op)
        return _round(op(*(_widen(x).data for x in (lhs, rhs, other))))

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), d, *rest)

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        from_bf16, to_bf16 = _is_bf16(src), dst.scalar == tl.bfloat16
        if from_bf16 and not to_bf16:
            wide = _widen(src)
            return wide if dst.scalar == tl.float32 else cast(self, wide, dst)
        return _round(src.data) if to_bf16 and not from_bf16 else cast(self, src, dst)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: _round(np.array([value], np.float32))


def _patch_reductions() -> None:
    total, min_max = interpreter.ReduceOps.sum, interpreter.ReduceOps.min_max

    def widened(x: Any) -> Any:
        kind = tl.block_type(tl.float32, x.shape) if x.shape else tl.float32
        return tl.core.tensor(_widen(x.handle), kind)

    def rounded(x: Any) -> Any:
        kind = tl.block_type(tl.bfloat16, x.shape) if x.shape else tl.bfloat16
        return tl.core.tensor(_round(x.handle.data), kind)

    def sum_(self: Any, x: Any) -> Any:
        return rounded(total(self, widened(x))) if x.dtype == tl.bfloat16 else total(self, x)

    def min_max_(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        first = x[0] if isinstance(x, tuple) else x
        if first.dtype != tl.bfloat16:
            return min_max(self, x, *args, **kwargs)
        result = min_max(self, widened(first), *args, **kwargs)
        if isinstance(result, tuple):
            return rounded(result[0]), result[1]
        return rounded(result) if result.dtype == tl.float32 else result

    interpreter.ReduceOps.sum, interpreter.ReduceOps.min_max = sum_, min_max_


def _patch_index() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).squeeze())

    interpreter._patch_lang_tensor = patch_lang_tensor
