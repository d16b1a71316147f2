"""Attention of chunks of query tokens over their sequences' pages: causal from the bottom right, chunks of any lengths in one launch.

A program holds BLOCK_M rows of one sequence and one kv head; a row is a token and a query head of the group, token-major, so
that small chunks and large groups fill the tile alike (FlashInfer, arXiv 2501.01005). The grid is bounded by what the host
knows, tokens and sequences; a program finds its sequence on the device. Late rows, which see the most keys, start first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import capability, launch
from .paged_tiles import (
    LN2,
    as_bytes,
    attend_tiles,
    finish_softmax,
    load_queries,
    logits_of,
    page_options,
    positive_scale,
    start_softmax,
)

# capability -> widest of BLOCK_D, BLOCK_V -> (BLOCK_M, BLOCK_N, num_warps, num_stages). Behind a page table five stages keep the
# next tile on its way while one is computed (three load it only then), and few programs fit a multiprocessor to hide the loads.
CONFIGS = {
    100: {64: (128, 64, 8, 5), 128: (128, 64, 8, 5), 256: (128, 32, 8, 5), 512: (64, 16, 8, 3)},
    90: {64: (128, 64, 4, 5), 128: (128, 64, 8, 5), 256: (128, 32, 8, 5), 512: (32, 16, 8, 5)},
    80: {64: (64, 64, 4, 3), 128: (128, 32, 8, 5), 256: (64, 32, 8, 5), 512: (32, 16, 8, 5)},
}
MIDDLE_CONFIGS = {64: (64, 64, 4, 5), 128: (64, 32, 4, 5), 256: (64, 32, 8, 5), 512: (32, 16, 8, 5)}  # to 64 rows
SMALL_CONFIGS = {64: (16, 64, 4, 5), 128: (16, 64, 4, 5), 256: (16, 32, 4, 5), 512: (16, 16, 4, 5)}  # to 16 rows
WIDE_CONFIGS = {64: (32, 32, 4, 2), 128: (16, 32, 4, 2), 256: (16, 16, 4, 2), 512: (16, 16, 8, 1)}  # float32


def paged_prefill(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    sliding_window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    first_seq: int,
    num_tokens: int,
    max_query_len: int,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
) -> None:
    """`ops.paged_attention`, validating nothing.

    Args:
        first_seq: sequences before it are left out, and so are their rows of q.
        num_tokens: query tokens of the others.
        max_query_len: no sequence has more query tokens.
        q, out: last axis dense.
    """
    num_seqs, num_kv_heads = seq_lens.shape[0] - first_seq, k_pages.shape[1]
    group = q.shape[1] // num_kv_heads
    options = page_options(k_pages, v_pages)
    width = max(64, options["BLOCK_D"], options["BLOCK_V"])
    block_m, block_n, num_warps, num_stages = _config(q, width, max_query_len * group)
    if (sliding_window and width == 64) or options["FP8"] == 2:
        num_stages = min(num_stages, 3)  # the third loop, or the conversion, needs the registers
    q, scale = positive_scale(q, scale)
    logits = logits_of(scale, softcap)
    launch(
        _prefill_kernel, (num_kv_heads, num_tokens * group // block_m + 1 + num_seqs),
        q, as_bytes(k_pages), as_bytes(v_pages), q if k_scales is None else k_scales, q if v_scales is None else v_scales,
        page_table, seq_lens, query_start_loc, q if sinks is None else sinks, out, q if out_lse is None else out_lse,
        first_seq, num_seqs, num_kv_heads,
        *q.stride()[:2], page_table.stride(0), *out.stride()[:2], 0 if out_lse is None else out_lse.stride(0),
        logits.qk_scale, logits.unit, logits.cap, sliding_window,
        GROUP=group, BLOCK_M=block_m, BLOCK_N=block_n,
        HAS_WINDOW=sliding_window > 0, HAS_CAP=softcap > 0, HAS_SINKS=sinks is not None, HAS_LSE=out_lse is not None,
        num_warps=num_warps, num_stages=num_stages, **options,
    )  # fmt: skip


def _config(q: torch.Tensor, width: int, most_rows: int) -> tuple[int, int, int, int]:
    if q.dtype == torch.float32:
        return WIDE_CONFIGS[width]
    if most_rows <= 16:
        return SMALL_CONFIGS[width]
    if most_rows <= 64:
        return MIDDLE_CONFIGS[width]
    chip = capability(q.device)
    return CONFIGS[100 if chip >= 100 else 90 if chip >= 90 else 80][width]


@triton.jit(  # what differs from step to step must not need new code
    do_not_specialize=["first_seq", "num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "starts_ptr"],
)
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr, seq_lens_ptr, starts_ptr, sinks_ptr, out_ptr, lse_ptr,
    first_seq, num_seqs, num_kv_heads, q_token_stride, q_head_stride, table_stride, out_token_stride, out_head_stride, lse_stride,
    qk_scale, unit, cap, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, FP8: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    starts_ptr += first_seq
    tile = tl.num_programs(1) - 1 - tl.program_id(1) + tl.load(starts_ptr) * GROUP // BLOCK_M
    seq = _sequence_of(tile, starts_ptr, num_seqs, GROUP, BLOCK_M)
    start = tl.load(starts_ptr + seq)
    query_len = tl.load(starts_ptr + seq + 1) - start
    first_row = (tile - _first_tile(start, seq, GROUP, BLOCK_M)) * BLOCK_M
    if first_row >= query_len * GROUP:
        return
    offset = tl.load(seq_lens_ptr + first_seq + seq) - query_len  # position of the sequence's first query

    rows = first_row + tl.arange(0, BLOCK_M)
    tokens = rows // GROUP
    row_mask = tokens < query_len
    heads = kv_head * GROUP + rows % GROUP
    places = (start + tokens).to(tl.int64)
    q = load_queries(q_ptr, places, heads, row_mask, q_token_stride, q_head_stride, HEAD_DIM, BLOCK_D)
    row_max, row_sum, acc = start_softmax(sinks_ptr, heads, row_mask, HAS_SINKS, BLOCK_M, BLOCK_V)
    lowest = offset + first_row // GROUP
    highest = offset + tl.minimum(first_row + BLOCK_M - 1, query_len * GROUP - 1) // GROUP
    last = tl.maximum(highest + 1, 0)
    full_end = tl.maximum(lowest + 1, 0) // BLOCK_N * BLOCK_N  # every row sees all keys of the tiles before
    first, begin = 0, 0
    table = table_ptr + (first_seq + seq).to(tl.int64) * table_stride
    positions = offset + tokens
    if HAS_WINDOW:
        first = tl.maximum(lowest - window + 1, 0)
        full_begin = tl.cdiv(tl.maximum(highest - window + 1, 0), BLOCK_N) * BLOCK_N
        begin = tl.minimum(full_begin, full_end)
        row_max, row_sum, acc = attend_tiles(
            q, row_max, row_sum, acc, first // BLOCK_N * BLOCK_N, begin, first, last, positions,
            k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table, kv_head, num_kv_heads, qk_scale, unit, cap, window,
            True, HAS_WINDOW, HAS_CAP, FP8, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip
    row_max, row_sum, acc = attend_tiles(
        q, row_max, row_sum, acc, begin, full_end, first, last, positions,
        k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table, kv_head, num_kv_heads, qk_scale, unit, cap, window,
        False, HAS_WINDOW, HAS_CAP, FP8, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, PAGE_SIZE, BLOCK_N,
    )  # fmt: skip
    row_max, row_sum, acc = attend_tiles(
        q, row_max, row_sum, acc, tl.maximum(full_end, first // BLOCK_N * BLOCK_N), last, first, last, positions,
        k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table, kv_head, num_kv_heads, qk_scale, unit, cap, window,
        True, HAS_WINDOW, HAS_CAP, FP8, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, PAGE_SIZE, BLOCK_N,
    )  # fmt: skip

    result, lse = finish_softmax(row_max, row_sum, acc)
    values = tl.arange(0, BLOCK_V)
    target = out_ptr + places[:, None] * out_token_stride + heads[:, None] * out_head_stride + values[None, :]
    keep = row_mask[:, None] & (values[None, :] < V_DIM)
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=keep)
    if HAS_LSE:
        tl.store(lse_ptr + places * lse_stride + heads, lse * LN2, mask=row_mask)


@triton.jit
def _first_tile(start, seq, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """A number for each sequence's first tile that leaves room for the tiles of those before it."""
    return start * GROUP // BLOCK_M + seq


@triton.jit
def _sequence_of(tile, starts_ptr, num_seqs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The last sequence whose first tile is not past `tile`."""
    before = tl.zeros([128], tl.int32)
    for begin in range(0, num_seqs, 128):
        seqs = begin + tl.arange(0, 128)
        starts = tl.load(starts_ptr + seqs, mask=seqs < num_seqs, other=0)
        before += ((seqs < num_seqs) & (_first_tile(starts, seqs, GROUP, BLOCK_M) <= tile)).to(tl.int32)
    return tl.sum(before, 0) - 1
