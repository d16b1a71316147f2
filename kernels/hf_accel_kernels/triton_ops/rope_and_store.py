"""Head norms, rotary embedding and the store into pages as one Triton kernel. See `rope_and_store.py`.

A program takes one token's block of query heads, or of keys and values. A head is held as the two halves that rotate into
each other and the rest that does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import larger, row_maxima, row_scales, to_e4m3
from .kv_store import page_rows, pointers, store_heads
from .launch import launch

TILE = 1024  # elements of a program's rotating halves


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`rope_and_store.rope_and_store`; validates nothing."""
    (num_tokens, num_heads, dim), num_kv_heads, v_dim = q.shape, k.shape[1], v.shape[2]
    rotary = dim if cos is None else cos.shape[1]
    half_pad = triton.next_power_of_2(max(1, -(-rotary // 2)))
    block = min(triton.next_power_of_2(max(num_heads, num_kv_heads)), max(1, TILE // half_pad))
    launch(
        _rope_kernel,
        (num_tokens, triton.cdiv(num_heads, block) + triton.cdiv(num_kv_heads, block)),
        q,
        k,
        v,
        out,
        *pointers(k_pages, k_scales),
        *pointers(v_pages, v_scales),
        slot_mapping.contiguous(),
        positions,
        cos,
        sin,
        q_norm,
        k_norm,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=k_pages.shape[2],
        DIM=dim,
        V_DIM=v_dim,
        V_PAD=triton.next_power_of_2(v_dim),
        ROTARY=rotary,
        HALF_PAD=half_pad,
        REST_PAD=0 if rotary == dim else triton.next_power_of_2(dim - rotary),
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _scaled(x, factor, weight_ptr, columns, mask, dtype: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return (weight * (x * factor).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _rotated(x, other, cos_ptr, sin_ptr, columns, mask, SIGN: tl.constexpr, dtype: tl.constexpr):
    """x * cos + SIGN * other * sin, each product and the sum rounded to `dtype`."""
    cos = tl.load(cos_ptr + columns, mask=mask, other=0.0).to(dtype).to(tl.float32)
    sin = tl.load(sin_ptr + columns, mask=mask, other=0.0).to(dtype).to(tl.float32)
    along, across = (x * cos).to(dtype).to(tl.float32), (other * sin).to(dtype).to(tl.float32)
    return (along + SIGN * across).to(dtype).to(tl.float32)


@triton.jit
def _prepared(
    source,
    heads_mask,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
):
    """Heads at `source` [BLOCK] pointers, normed and rotated: float32 [BLOCK, HALF_PAD] twice and the rest, 0 where masked."""
    dtype: tl.constexpr = source.dtype.element_ty
    HALF: tl.constexpr = (ROTARY + 1) // 2
    columns = tl.arange(0, HALF_PAD)[None, :]
    in_low, in_high = columns < HALF, columns < ROTARY - HALF
    low = tl.load(source[:, None] + columns, mask=heads_mask[:, None] & in_low, other=0.0).to(tl.float32)
    high = tl.load(source[:, None] + HALF + columns, mask=heads_mask[:, None] & in_high, other=0.0).to(tl.float32)
    rest = low
    if REST_PAD > 0:
        others = ROTARY + tl.arange(0, REST_PAD)[None, :]
        rest = tl.load(source[:, None] + others, mask=heads_mask[:, None] & (others < DIM), other=0.0).to(tl.float32)
    if weight_ptr is not None:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if REST_PAD > 0:
            squares += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / DIM + eps)[:, None]
        low = _scaled(low, factor, weight_ptr, columns, in_low, dtype)
        high = _scaled(high, factor, weight_ptr, HALF + columns, in_high, dtype)
        if REST_PAD > 0:
            rest = _scaled(rest, factor, weight_ptr, others, others < DIM, dtype)
    if cos_ptr is not None:
        turned = _rotated(low, high, cos_ptr, sin_ptr, columns, in_low, -1.0, dtype)
        high = _rotated(high, low, cos_ptr, sin_ptr, HALF + columns, in_high, 1.0, dtype)
        low = turned
    return low, high, rest


@triton.jit
def _as_stored(x, dtype: tl.constexpr, FP8: tl.constexpr):
    if FP8:
        return to_e4m3(x)
    else:
        return x.to(dtype)


@triton.jit
def _write(
    target,
    heads_mask,
    low,
    high,
    rest,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    FP8: tl.constexpr,
):
    """The three parts to `target` [BLOCK] pointers, as the elements there are; FP8: parts were divided by their scales."""
    HALF: tl.constexpr = (ROTARY + 1) // 2
    columns = tl.arange(0, HALF_PAD)[None, :]
    dtype: tl.constexpr = target.dtype.element_ty
    in_low, in_high = heads_mask[:, None] & (columns < HALF), heads_mask[:, None] & (columns < ROTARY - HALF)
    tl.store(target[:, None] + columns, _as_stored(low, dtype, FP8), mask=in_low)
    tl.store(target[:, None] + HALF + columns, _as_stored(high, dtype, FP8), mask=in_high)
    if REST_PAD > 0:
        others = ROTARY + tl.arange(0, REST_PAD)[None, :]
        tl.store(target[:, None] + others, _as_stored(rest, dtype, FP8), mask=heads_mask[:, None] & (others < DIM))


@triton.jit
def _store_keys(
    pages_ptr,
    scales_ptr,
    rows,
    heads_mask,
    low,
    high,
    rest,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
):
    FP8: tl.constexpr = scales_ptr is not None
    if FP8:
        largest = larger(row_maxima(low), row_maxima(high))
        if REST_PAD > 0:
            largest = larger(largest, row_maxima(rest))
        scales = row_scales(largest)
        tl.store(scales_ptr + rows, scales, mask=heads_mask)
        low, high = tl.div_rn(low, scales[:, None]), tl.div_rn(high, scales[:, None])
        rest = tl.div_rn(rest, scales[:, None])
    _write(pages_ptr + rows * DIM, heads_mask, low, high, rest, DIM, ROTARY, HALF_PAD, REST_PAD, FP8)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    k_pages_ptr,
    k_scales_ptr,
    v_pages_ptr,
    v_scales_ptr,
    slots_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK - 1) // BLOCK
    if cos_ptr is not None:
        position = tl.load(positions_ptr + token)
        cos_ptr, sin_ptr = cos_ptr + position * ROTARY, sin_ptr + position * ROTARY
    if block < Q_BLOCKS:
        heads = block * BLOCK + tl.arange(0, BLOCK)
        mask = heads < NUM_HEADS
        source = q_ptr + token * q_token + heads * q_head
        low, high, rest = _prepared(source, mask, q_norm_ptr, cos_ptr, sin_ptr, eps, DIM, ROTARY, HALF_PAD, REST_PAD)
        tl.debug_barrier()  # `out` may be q
        target = out_ptr + token * out_token + heads * out_head
        _write(target, mask, low, high, rest, DIM, ROTARY, HALF_PAD, REST_PAD, False)
        return
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads = (block - Q_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = heads < NUM_KV_HEADS
    rows = page_rows(slot, heads, NUM_KV_HEADS, PAGE_SIZE)
    source = k_ptr + token * k_token + heads * k_head
    low, high, rest = _prepared(source, mask, k_norm_ptr, cos_ptr, sin_ptr, eps, DIM, ROTARY, HALF_PAD, REST_PAD)
    _store_keys(k_pages_ptr, k_scales_ptr, rows, mask, low, high, rest, DIM, ROTARY, HALF_PAD, REST_PAD)
    store_heads(v_ptr + token * v_token + heads * v_head, 1, v_pages_ptr, v_scales_ptr, rows, mask, V_DIM, V_PAD)
