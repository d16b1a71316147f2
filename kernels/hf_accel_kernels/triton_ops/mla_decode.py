"""Absorbed latent attention over pages as Triton kernels: decode rows and short chunks. See `mla.mla_attention`.

A tile's rows are (query token, head) pairs, so one load of a latent serves all of its heads, as keys and, its first `rank`
columns, as values (flash decoding, arXiv 2311.01282 section 2; DeepSeek-V2, arXiv 2405.04434). A sequence's keys are split into
parts whose number is chosen on the device from all lengths: programs take items (sequence, block of tokens, part) off one list,
long sequences give many. `_merge_kernel` joins parts by their log-sum-exp. Nothing depends on lengths on the host, so a CUDA
graph of it stays right when lengths change. Owns the table of configurations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import capability, launch, num_processors
from .mla_items import find_item, place

FP8_NATIVE = 89  # capability from which e4m3 is converted by the chip
BLOCK_SEQS = 256  # sequences looked at at once in search of an item
MERGE_HEADS = 8


class Config(NamedTuple):
    """One tile: `tokens` x `heads` rows against `keys` columns."""

    tokens: int
    heads: int
    keys: int
    num_warps: int
    num_stages: int
    resident: int  # programs that a processor holds at a time

    def options(self) -> dict[str, int]:
        """As `launch` takes them."""
        return {
            "TOKENS": self.tokens,
            "HEADS": self.heads,
            "BLOCK_N": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def config(chip: int, num_heads: int, several: bool, fp8: bool, element_size: int) -> Config:
    """The tile for `num_heads` heads; `several`: sequences have more than one query token."""
    heads = max(16, triton.next_power_of_2(num_heads))
    if element_size == 4:  # float32 never reaches tensor cores
        return Config(1, 16, 16, 8, 1, 1)
    rows = 64 if chip >= 90 and not fp8 and (several or heads >= 64) else 32  # 64: a warp group's matrix instruction
    heads = min(heads, rows)
    tokens = rows // heads if several else 1
    if tokens * heads == 16 and not fp8:
        return Config(tokens, heads, 32, 4, 3, 2)
    return Config(tokens, heads, 32, 8, 3 if chip < 100 and (fp8 or rows == 64) else 2, 1)


def mla_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    rank: int,
    scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`mla.mla_attention` into `out`; validates nothing. Tokens beyond the last of `query_start_loc` are not written."""
    (num_tokens, num_heads, width), num_seqs = q.shape, seq_lens.shape[0]
    if not num_tokens or not num_seqs:
        return
    chip, page_size = capability(q.device), pages.shape[1]
    tile = config(chip, num_heads, num_tokens > num_seqs, scales is not None, q.element_size())
    head_blocks = triton.cdiv(num_heads, tile.heads)
    token_blocks = min(num_tokens, num_tokens // tile.tokens + num_seqs)
    min_part = 2 * tile.keys
    capacity = max(1, num_processors(q.device) * tile.resident // head_blocks)
    most_parts = max(1, triton.cdiv(page_table.shape[1] * page_size, min_part))
    num_items = min(capacity + token_blocks, token_blocks * most_parts)
    # A sequence in several parts is at least 1.5 ideal ones long, so at most 4/3 of the capacity are such parts.
    rows = min(num_items, 4 * capacity // 3 + 1) * head_blocks * tile.tokens * tile.heads
    parted = num_items > token_blocks
    parts = q.new_empty((rows if parted else 1, rank), dtype=torch.float32)
    lse = q.new_empty(rows if parted else 1, dtype=torch.float32)
    found = seq_lens.new_empty(num_tokens if parted else 1, 2)  # of a token: its first row of parts, their number
    fp8 = 0 if scales is None else (1 if chip >= FP8_NATIVE else 2)
    stored = (pages, pages) if scales is None else (pages.view(torch.uint8), scales)
    launch(
        _attend_kernel,
        (num_items * head_blocks,),
        *(q, *stored, page_table, seq_lens, query_start_loc, out, parts, lse, found),
        *(scale * math.log2(math.e), num_seqs, num_heads, head_blocks, capacity),
        *(*q.stride(), page_table.stride(0), *out.stride()[:2]),
        **_widths(RANK=rank, ROPE=width - rank),
        PAGE_SIZE=page_size,
        FP8=fp8,
        MIN_PART=min_part,
        PARTED=parted,
        SEQS=BLOCK_SEQS,
        **tile.options(),
    )
    if parted:
        launch(
            _merge_kernel,
            (num_tokens, triton.cdiv(num_heads, MERGE_HEADS)),
            *(parts, lse, found, query_start_loc, out),
            *(num_seqs, num_heads, head_blocks * tile.tokens * tile.heads, *out.stride()[:2]),
            **_widths(RANK=rank),
            HEADS=tile.heads,
            ROWS=tile.tokens * tile.heads,
            BLOCK_H=MERGE_HEADS,
        )


def _widths(**widths: int) -> dict[str, int]:
    """Each width, and its padding to what a matrix instruction takes."""
    return widths | {f"{name}_PAD": max(16, triton.next_power_of_2(width)) for name, width in widths.items()}


@triton.jit
def _load_keys(
    base, stride_row, rows, inside, WIDTH: tl.constexpr, PAD: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr
):
    """[keys, PAD] of `DTYPE`; fp8 bit patterns (2) come out as 2^-8 of their value, which the scales make up for."""
    columns = tl.arange(0, PAD)
    mask = inside[:, None] & (columns < WIDTH)[None, :] if PAD != WIDTH else inside[:, None]
    keys = tl.load(base + rows[:, None] * stride_row + columns[None, :], mask=mask, other=0)
    if FP8 == 2:
        bits = ((keys & 0x80).to(tl.uint16) << 8) | ((keys & 0x7F).to(tl.uint16) << 7)
        keys = bits.to(tl.float16, bitcast=True).to(DTYPE)
    elif FP8 == 1:
        keys = keys.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return keys


@triton.jit
def _tile(
    q,
    q_rope,
    bound,
    begin,
    end,
    pages_ptr,
    scales_ptr,
    table_ptr,
    scale_log2,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Online softmax of the rows over keys begin..end: (mean of latents [rows, RANK_PAD], log2-sum-exp2 [rows])."""
    highest = tl.full([q.shape[0]], -float("inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], RANK_PAD], tl.float32)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < end
        if PAGE_SIZE % BLOCK_N == 0:  # begin is a multiple of BLOCK_N: the tile lies in one page
            base = tl.load(table_ptr + n0 // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + n0 % PAGE_SIZE
            rows = tl.arange(0, BLOCK_N)
        else:
            base = tl.zeros([], tl.int64)
            rows = tl.load(table_ptr + n // PAGE_SIZE, mask=inside, other=0).to(tl.int64) * PAGE_SIZE + n % PAGE_SIZE
        tile_ptr, tile_scales_ptr = pages_ptr + base * (RANK + ROPE), scales_ptr + base * 2
        latent = _load_keys(tile_ptr, RANK + ROPE, rows, inside, RANK, RANK_PAD, FP8, q.dtype)
        logits = tl.dot(q, tl.trans(latent), input_precision="ieee")
        if FP8 > 0:
            factor = 256.0 if FP8 == 2 else 1.0
            latent_scale = tl.load(tile_scales_ptr + rows * 2, mask=inside, other=0.0) * factor
            logits *= latent_scale[None, :]
        if ROPE > 0:
            rope = _load_keys(tile_ptr + RANK, RANK + ROPE, rows, inside, ROPE, ROPE_PAD, FP8, q.dtype)
            rope_logits = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
            if FP8 > 0:
                rope_logits *= (tl.load(tile_scales_ptr + rows * 2 + 1, mask=inside, other=0.0) * factor)[None, :]
            logits += rope_logits
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] < bound[:, None])
        logits = tl.where(seen, logits * scale_log2, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        decay = tl.exp2(highest - reference)
        weights = tl.exp2(logits - reference[:, None])
        total = total * decay + tl.sum(weights, 1)
        if FP8 > 0:
            weights *= latent_scale[None, :]
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), latent, acc, input_precision="ieee")
        highest = higher
    divisor = tl.where(total == 0.0, 1.0, total)
    return acc / divisor[:, None], highest + tl.log2(divisor)


@triton.jit
def _attend_kernel(
    q_ptr, pages_ptr, scales_ptr, table_ptr, seq_lens_ptr, starts_ptr, out_ptr, parts_ptr, lse_ptr, found_ptr,
    scale_log2, num_seqs, num_heads, head_blocks, capacity,
    q_token, q_head, q_column, table_row, out_token, out_head,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    MIN_PART: tl.constexpr, PARTED: tl.constexpr, SEQS: tl.constexpr,
):  # fmt: skip
    item, head_block = tl.program_id(0) // head_blocks, tl.program_id(0) % head_blocks
    seq, first, parted, ideal = find_item(item, seq_lens_ptr, starts_ptr, num_seqs, capacity, TOKENS, MIN_PART, SEQS)
    if seq >= num_seqs:
        return
    start, query_len, seq_len, num_parts, part, token0 = place(
        item - first, seq, ideal, seq_lens_ptr, starts_ptr, TOKENS
    )
    row = tl.arange(0, TOKENS * HEADS)
    token, head = token0 + row // HEADS, head_block * HEADS + row % HEADS
    valid = (token < query_len) & (head < num_heads)
    columns, rope_columns = tl.arange(0, RANK_PAD), tl.arange(0, ROPE_PAD)
    q_row = q_ptr + (start + token).to(tl.int64) * q_token + head * q_head
    q = tl.load(
        q_row[:, None] + columns[None, :] * q_column, mask=valid[:, None] & (columns < RANK)[None, :], other=0.0
    )
    rope_mask = valid[:, None] & (rope_columns < ROPE)[None, :]
    q_rope = tl.load(q_row[:, None] + (RANK + rope_columns)[None, :] * q_column, mask=rope_mask, other=0.0)

    bound = seq_len - query_len + token + 1
    size = tl.cdiv(tl.cdiv(seq_len, num_parts), BLOCK_N) * BLOCK_N
    end = tl.minimum((part + 1) * size, seq_len - query_len + tl.minimum(token0 + TOKENS, query_len))
    mean, lse = _tile(
        q, q_rope, bound, part * size, end, pages_ptr, scales_ptr, table_ptr + seq.to(tl.int64) * table_row, scale_log2,
        RANK, RANK_PAD, ROPE, ROPE_PAD, PAGE_SIZE, FP8, BLOCK_N, TOKENS > 1,
    )  # fmt: skip
    never = tl.where(tl.max(lse, 0) == float("inf"), 1, 0)  # found anew below, these need no registers in the loop
    row, pid = row + never, tl.program_id(0) + never
    item, head_block = pid // head_blocks, pid % head_blocks
    start, query_len, _, num_parts, part, token0 = place(
        item - first, seq + never, ideal, seq_lens_ptr, starts_ptr, TOKENS
    )
    token, head = token0 + row // HEADS, head_block * HEADS + row % HEADS
    valid = (token < query_len) & (head < num_heads)
    stored = valid[:, None] & (columns < RANK)[None, :]
    first_row = ((parted + item - first - part) * head_blocks * (TOKENS * HEADS)).to(tl.int64)
    if (part == 0) & (head_block == 0) & PARTED:
        named = (row % HEADS == 0) & (token < query_len)
        found = found_ptr + (start + token) * 2
        tl.store(found, (first_row + row).to(tl.int32), mask=named)
        tl.store(found + 1, tl.zeros_like(row) + num_parts, mask=named)
    if num_parts == 1:
        out_row = out_ptr + (start + token).to(tl.int64) * out_token + head * out_head
        tl.store(out_row[:, None] + columns[None, :], mean.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        part_row = first_row + (part * head_blocks + head_block) * (TOKENS * HEADS) + row
        tl.store(parts_ptr + part_row[:, None] * RANK + columns[None, :], mean, mask=stored)
        tl.store(lse_ptr + part_row, lse, mask=valid)


@triton.jit
def _merge_kernel(
    parts_ptr,
    lse_ptr,
    found_ptr,
    starts_ptr,
    out_ptr,
    num_seqs,
    num_heads,
    part_stride,
    out_token,
    out_head,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0)
    if token >= tl.load(starts_ptr + num_seqs):
        return
    num_parts = tl.load(found_ptr + token * 2 + 1)
    if num_parts == 1:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, RANK_PAD)
    mask = (head < num_heads)[:, None] & (columns < RANK)[None, :]
    row = tl.load(found_ptr + token * 2).to(tl.int64) + head // HEADS * ROWS + head % HEADS
    highest = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, RANK_PAD], tl.float32)
    for _ in range(0, num_parts):
        lse = tl.load(lse_ptr + row, mask=head < num_heads, other=-float("inf"))
        mean = tl.load(parts_ptr + row[:, None] * RANK + columns[None, :], mask=mask, other=0.0)
        higher = tl.maximum(highest, lse)
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        decay, weight = tl.exp2(highest - reference), tl.exp2(lse - reference)
        acc = acc * decay[:, None] + mean * weight[:, None]
        total = total * decay + weight
        highest = higher
        row += part_stride
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = out_ptr + token.to(tl.int64) * out_token + head[:, None] * out_head + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
