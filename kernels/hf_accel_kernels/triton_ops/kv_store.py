"""Stores new tokens' keys and values into their pages as a Triton kernel, quantized where pages are fp8. See `ops.store_kv`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fp8 import row_maxima, row_scales, to_e4m3
from .launch import launch

TILE = 2048  # elements of a program's keys, and of its values


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> None:
    """`ops.store_kv`; validates nothing."""
    num_heads, page_size, dim = k_pages.shape[1:]
    v_dim = v_pages.shape[3]
    dim_pad, v_pad = triton.next_power_of_2(dim), triton.next_power_of_2(v_dim)
    block = min(triton.next_power_of_2(num_heads), max(1, TILE // max(dim_pad, v_pad)))
    launch(
        _store_kernel,
        (k.shape[0], triton.cdiv(num_heads, block)),
        k,
        v,
        *pointers(k_pages, k_scales),
        *pointers(v_pages, v_scales),
        slot_mapping,
        *k.stride(),
        *v.stride(),
        slot_mapping.stride(0),
        NUM_HEADS=num_heads,
        PAGE_SIZE=page_size,
        DIM=dim,
        DIM_PAD=dim_pad,
        V_DIM=v_dim,
        V_PAD=v_pad,
        BLOCK=block,
        num_warps=4,
    )


def pointers(pages: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pages and scales as kernels take them: fp8 as bytes."""
    return (pages if scales is None else pages.view(torch.uint8), scales)


@triton.jit
def page_rows(slot, heads, NUM_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """int64 rows of the pages, seen as [num_pages * num_heads * page_size, dim], that hold a slot's heads."""
    return (slot // PAGE_SIZE * NUM_HEADS + heads) * PAGE_SIZE + slot % PAGE_SIZE


@triton.jit
def store_heads(
    source,
    column_stride,
    pages_ptr,
    scales_ptr,
    rows,
    heads_mask,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """One token's heads: from `source` [BLOCK] pointers to the pages' `rows` [BLOCK], in fp8 if there are scales."""
    columns = tl.arange(0, DIM_PAD)[None, :]
    mask = heads_mask[:, None] & (columns < DIM)
    values = tl.load(source[:, None] + columns * column_stride, mask=mask, other=0.0)
    target = pages_ptr + rows[:, None] * DIM + columns
    if scales_ptr is not None:
        values = values.to(tl.float32)
        scales = row_scales(row_maxima(values))
        tl.store(scales_ptr + rows, scales, mask=heads_mask)
        tl.store(target, to_e4m3(tl.div_rn(values, scales[:, None])), mask=mask)
    else:
        tl.store(target, values, mask=mask)


@triton.jit
def _store_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    k_scales_ptr,
    v_pages_ptr,
    v_scales_ptr,
    slots_ptr,
    k_token,
    k_head,
    k_column,
    v_token,
    v_head,
    v_column,
    slot_stride,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token * slot_stride)
    if slot < 0:
        return
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = heads < NUM_HEADS
    rows = page_rows(slot, heads, NUM_HEADS, PAGE_SIZE)
    keys, values = k_ptr + token * k_token + heads * k_head, v_ptr + token * v_token + heads * v_head
    store_heads(keys, k_column, k_pages_ptr, k_scales_ptr, rows, mask, DIM, DIM_PAD)
    store_heads(values, v_column, v_pages_ptr, v_scales_ptr, rows, mask, V_DIM, V_PAD)
