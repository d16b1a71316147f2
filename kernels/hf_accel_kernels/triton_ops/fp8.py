"""float32 to e4m3 in Triton, the same on every chip: those before capability 8.9 have no instruction for it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_scales(largest):
    """What stored e4m3 values are multiplied with, from the largest magnitudes of their rows: 1 where these are 0."""
    scales = tl.div_rn(largest, 448.0)
    return tl.where(scales == 0.0, 1.0, scales)


@triton.jit
def row_maxima(values):
    """Largest magnitudes along the last axis of float32 [num_rows, width]; NaN for a row with a NaN, as torch has it."""
    largest = tl.max(tl.abs(values), 1)
    has_nan = tl.max((values != values).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), largest)


@triton.jit
def larger(a, b):
    """The elementwise maximum; NaN where either is."""
    return tl.where(a != a, a, tl.where(b != b, b, tl.maximum(a, b)))


@triton.jit
def to_e4m3(x):
    """float32 in [-448, 448] or NaN -> bit patterns uint8, nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rebiased = magnitude - (120 << 23)  # exponents are 7 and 127 more than what they stand for
    normal = (rebiased + 0x7FFFF + ((rebiased >> 20) & 1)) >> 20
    # Below 2^-6 the step is 2^-9, which is float32's step at 2^14: the addition rounds.
    subnormal = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | (bits >> 31 << 7)).to(tl.uint8)
