"""Attention of one query token a sequence over its pages: long contexts are split among programs, then merged.

A program holds the queries of one kv head's group, so that each key is loaded once for all of them, and walks one split of
one sequence (Flash-Decoding; the split by length as in FlashInfer, arXiv 2501.01005, but decided on the device: lengths may
change between replays of a captured launch). The grid has as many splits as any sequence may have; those it has not, exit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch, num_processors
from .paged_tiles import (
    LN2,
    LOWEST,
    as_bytes,
    attend_tiles,
    finish_softmax,
    load_queries,
    logits_of,
    page_options,
    positive_scale,
    start_softmax,
)

MOST_SPLITS = 128
SHORTEST_SPLIT = 128  # tokens
WAVES = 2  # splits that a busy device should have for each place where one runs
RESIDENT = 3  # such places of a multiprocessor

# widest of BLOCK_D, BLOCK_V -> (BLOCK_N, num_warps, num_stages). Behind a page table three stages load a tile only when the last
# one is done with, five keep one more on its way, seven two: fp8 tiles are small, and their conversion leaves fewer programs
# room on a multiprocessor.
CONFIGS = {64: (128, 4, 5), 128: (64, 4, 5), 256: (32, 4, 5), 512: (16, 4, 5)}
FP8_CONFIGS = {64: (128, 4, 5), 128: (64, 4, 7), 256: (32, 4, 7), 512: (16, 4, 7)}
WIDE_CONFIGS = {64: (64, 4, 3), 128: (32, 4, 3), 256: (16, 4, 3), 512: (16, 4, 2)}  # float32


def paged_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    sliding_window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    max_seq_len: int,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
) -> None:
    """`ops.paged_attention` where token i is sequence i's only one. Validates nothing.

    Args:
        max_seq_len: no length in seq_lens is greater.
        q, out: last axis dense.
    """
    num_seqs, num_heads, _ = q.shape
    num_kv_heads = k_pages.shape[1]
    group = num_heads // num_kv_heads
    options = page_options(k_pages, v_pages)
    configs = WIDE_CONFIGS if q.dtype == torch.float32 else FP8_CONFIGS if options["FP8"] else CONFIGS
    block_n, num_warps, num_stages = configs[max(64, options["BLOCK_D"], options["BLOCK_V"])]
    block_h = min(64, max(16, triton.next_power_of_2(group)))
    head_blocks = num_kv_heads * triton.cdiv(group, block_h)
    places = WAVES * RESIDENT * num_processors(q.device)
    longest = min(max_seq_len, sliding_window + block_n) if sliding_window else max_seq_len
    num_splits = _num_splits(longest, num_seqs * head_blocks, places)
    split = num_splits > 1
    parts, part_lse, num_parts = out, out, seq_lens  # unused without splits
    if split:
        parts = q.new_empty(num_seqs, num_heads, num_splits, v_pages.shape[3], dtype=torch.float32)
        part_lse = q.new_empty(num_seqs, num_heads, num_splits, dtype=torch.float32)
        num_parts = torch.empty_like(seq_lens, memory_format=torch.contiguous_format)
    q, scale = positive_scale(q, scale)
    logits = logits_of(scale, softcap)
    has_sinks, has_lse = sinks is not None, out_lse is not None
    ends = (sinks if has_sinks else q, out, out_lse if has_lse else q)
    strides = (*out.stride()[:2], out_lse.stride(0) if has_lse else 0)
    launch(
        _decode_kernel, (head_blocks, num_splits, num_seqs),
        q, as_bytes(k_pages), as_bytes(v_pages), q if k_scales is None else k_scales, q if v_scales is None else v_scales,
        page_table, seq_lens, *ends, parts, part_lse, num_parts,
        num_seqs, num_kv_heads, num_splits, max(1, places // head_blocks),
        *q.stride()[:2], page_table.stride(0), *strides, logits.qk_scale, logits.unit, logits.cap, sliding_window,
        GROUP=group, BLOCK_H=block_h, BLOCK_N=block_n, SHORTEST=SHORTEST_SPLIT,
        HAS_WINDOW=sliding_window > 0, HAS_CAP=softcap > 0, HAS_SINKS=has_sinks and not split, HAS_LSE=has_lse and not split,
        SPLIT=split, num_warps=num_warps, num_stages=num_stages, **options,
    )  # fmt: skip
    if split:
        dims = {"V_DIM": options["V_DIM"], "BLOCK_V": options["BLOCK_V"], "BLOCK_S": 16}
        launch(
            _merge_splits_kernel, (num_heads, num_seqs),
            parts, part_lse, num_parts, *ends, num_splits, *strides,
            HAS_SINKS=has_sinks, HAS_LSE=has_lse, **dims, num_warps=4,
        )  # fmt: skip


def _num_splits(longest: int, num_blocks: int, places: int) -> int:
    """Splits that a sequence may have at most, when `num_blocks` programs would walk the whole of all sequences."""
    by_places = triton.cdiv(2 * places, max(1, num_blocks))
    return max(1, min(MOST_SPLITS, by_places, triton.cdiv(longest, SHORTEST_SPLIT)))


@triton.jit(  # what differs from step to step must not need new code
    do_not_specialize=["num_seqs", "max_splits", "places", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr"],
)
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr, seq_lens_ptr, sinks_ptr, out_ptr, lse_ptr,
    parts_ptr, part_lse_ptr, num_parts_ptr, num_seqs, num_kv_heads, max_splits, places,
    q_token_stride, q_head_stride, table_stride, out_token_stride, out_head_stride, lse_stride,
    qk_scale, unit, cap, window,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SHORTEST: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - window, 0)
    begin = first // BLOCK_N * BLOCK_N
    end = seq_len
    if SPLIT:
        span = seq_len - begin
        if (split > 0) & (split * SHORTEST >= span):
            return
        length = _split_length(seq_lens_ptr, num_seqs, span, window, max_splits, places, HAS_WINDOW, SHORTEST, BLOCK_N)
        if (split == 0) & (tl.program_id(0) == 0):
            tl.store(num_parts_ptr + seq, tl.cdiv(span, length))
        begin += split * length
        end = tl.minimum(begin + length, seq_len)
        if begin >= end:
            return

    head_rows = tl.program_id(0) % HEAD_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    row_mask = head_rows < GROUP
    heads = kv_head * GROUP + head_rows
    places_of_q = tl.zeros([BLOCK_H], tl.int64) + seq
    q = load_queries(q_ptr, places_of_q, heads, row_mask, q_token_stride, q_head_stride, HEAD_DIM, BLOCK_D)
    row_max, row_sum, acc = start_softmax(sinks_ptr, heads, row_mask, HAS_SINKS, BLOCK_H, BLOCK_V)
    positions = tl.full([BLOCK_H], seq_len - 1, tl.int32)
    row_max, row_sum, acc = attend_tiles(
        q, row_max, row_sum, acc, begin, end, first, end, positions,
        k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr + seq * table_stride, kv_head, num_kv_heads,
        qk_scale, unit, cap, window,
        True, HAS_WINDOW, HAS_CAP, FP8, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, PAGE_SIZE, BLOCK_N,
    )  # fmt: skip
    result, lse = finish_softmax(row_max, row_sum, acc)
    values = tl.arange(0, BLOCK_V)
    keep = row_mask[:, None] & (values[None, :] < V_DIM)
    if SPLIT:
        part = (seq * num_kv_heads * GROUP + heads) * max_splits + split
        tl.store(parts_ptr + part[:, None] * V_DIM + values[None, :], result, mask=keep)
        tl.store(part_lse_ptr + part, lse, mask=row_mask)
    else:
        target = out_ptr + seq * out_token_stride + heads[:, None] * out_head_stride + values[None, :]
        tl.store(target, result.to(out_ptr.dtype.element_ty), mask=keep)
        if HAS_LSE:
            tl.store(lse_ptr + seq * lse_stride + heads, lse * LN2, mask=row_mask)


@triton.jit
def _split_length(
    seq_lens_ptr, num_seqs, span, window, max_splits, places,
    HAS_WINDOW: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens of each split of a sequence: whole tiles, an even share of all sequences' tokens where max_splits allows."""
    total = tl.zeros([128], tl.int32)
    for start in range(0, num_seqs, 128):
        seqs = start + tl.arange(0, 128)
        lens = tl.load(seq_lens_ptr + seqs, mask=seqs < num_seqs, other=0)
        total += tl.minimum(lens, window + BLOCK_N) if HAS_WINDOW else lens
    share = tl.maximum(tl.cdiv(tl.sum(total, 0), places), SHORTEST)
    num_splits = tl.maximum(tl.minimum(tl.cdiv(span, share), max_splits), 1)
    return tl.maximum(tl.cdiv(tl.cdiv(span, num_splits), BLOCK_N), 1) * BLOCK_N


@triton.jit(do_not_specialize=["max_splits"])
def _merge_splits_kernel(
    parts_ptr, part_lse_ptr, num_parts_ptr, sinks_ptr, out_ptr, lse_ptr,
    max_splits, out_token_stride, out_head_stride, lse_stride,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    num_parts = tl.load(num_parts_ptr + seq)
    values = tl.arange(0, BLOCK_V)
    peak = LOWEST + 0.0
    total = 0.0
    if HAS_SINKS:
        peak = tl.load(sinks_ptr + head) / LN2
        total = 1.0
    acc = tl.zeros([BLOCK_V], tl.float32)
    first = (seq * tl.num_programs(0) + head) * max_splits
    for start in tl.range(0, num_parts, BLOCK_S, num_stages=3):
        splits = start + tl.arange(0, BLOCK_S)
        held = splits < num_parts
        lse = tl.load(part_lse_ptr + first + splits, mask=held, other=-float("inf"))
        pointers = parts_ptr + (first + splits)[:, None] * V_DIM + values[None, :]
        parts = tl.load(pointers, mask=held[:, None] & (values[None, :] < V_DIM), other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weights = tl.exp2(lse - new_peak)
        decay = tl.exp2(peak - new_peak)
        acc = acc * decay + tl.sum(parts * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        peak = new_peak
    some = tl.where(total == 0.0, 1.0, total)
    target = out_ptr + seq * out_token_stride + head * out_head_stride + values
    tl.store(target, (acc / some).to(out_ptr.dtype.element_ty), mask=values < V_DIM)
    if HAS_LSE:
        lse = tl.where(total == 0.0, -float("inf"), (peak + tl.log2(some)) * LN2)
        tl.store(lse_ptr + seq * lse_stride + head, lse)
