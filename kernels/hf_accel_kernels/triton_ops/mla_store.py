"""Stores new tokens' latents and rotated keys into pages as a Triton kernel, quantized to fp8 where pages are. See `mla.mla_store`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch


def mla_store(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """`mla.mla_store`; validates nothing. Negative slots skip their tokens."""
    rank, rope = latent.shape[1], rope_key.shape[1]
    launch(
        _store_kernel,
        (slot_mapping.shape[0],),
        latent,
        rope_key,
        pages if scales is None else pages.view(torch.uint8),
        pages if scales is None else scales,
        slot_mapping,
        *latent.stride(),
        *rope_key.stride(),
        slot_mapping.stride(0),
        RANK=rank,
        RANK_PAD=triton.next_power_of_2(rank),
        ROPE=rope,
        ROPE_PAD=triton.next_power_of_2(max(1, rope)),
        FP8=scales is not None,
        num_warps=2,
    )


@triton.jit
def _e4m3(x):
    """float32 in [-448, 448] or NaN to e4m3 bit patterns, nearest, ties to even: exact on every chip."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rebiased = magnitude - (120 << 23)
    normal = (rebiased + 0x7FFFF + ((rebiased >> 20) & 1)) >> 20
    # Below 2^-6 the step is 2^-9: that of float32 numbers at 2^14, to which adding rounds.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | (bits >> 31 << 7)).to(tl.uint8)


@triton.jit
def _store_part(source, stride, target, scale_ptr, WIDTH: tl.constexpr, PAD: tl.constexpr, FP8: tl.constexpr):
    columns = tl.arange(0, PAD)
    mask = columns < WIDTH
    values = tl.load(source + columns * stride, mask=mask, other=0.0)
    if FP8:
        values = values.to(tl.float32)
        largest = tl.max(tl.abs(values), 0)
        largest = tl.where(tl.max((values != values).to(tl.int32), 0) > 0, float("nan"), largest)
        scale = tl.div_rn(largest, 448.0)
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(scale_ptr, scale)
        tl.store(target + columns, _e4m3(tl.div_rn(values, scale)), mask=mask)
    else:
        tl.store(target + columns, values, mask=mask)


@triton.jit
def _store_kernel(
    latent_ptr,
    rope_ptr,
    pages_ptr,
    scales_ptr,
    slots_ptr,
    latent_token,
    latent_column,
    rope_token,
    rope_column,
    slot_stride,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    FP8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token * slot_stride)
    if slot < 0:
        return
    row, scale = pages_ptr + slot * (RANK + ROPE), scales_ptr + slot * 2
    _store_part(latent_ptr + token * latent_token, latent_column, row, scale, RANK, RANK_PAD, FP8)
    if ROPE > 0:
        _store_part(rope_ptr + token * rope_token, rope_column, row + RANK, scale + 1, ROPE, ROPE_PAD, FP8)
    elif FP8:
        tl.store(scale + 1, 1.0)
