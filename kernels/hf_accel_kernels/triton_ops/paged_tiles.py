"""What both paged attention kernels do with a tile of keys: gather it from its pages, score it, add it to a running softmax.

Pages are [num_pages, num_kv_heads, page_size, dim], so that a token's row is (page * num_kv_heads + head) * page_size + offset.
The running softmax is Flash-Attention's (arXiv 2205.14135), in base 2: a logit is `score * unit` with the scale folded in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import capability

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-3.0e38)  # running maximum before the first key: finite, so that nothing masked becomes NaN


@dataclass(frozen=True)
class Logits:
    """Factors with which kernels make base-2 logits: of scores without a soft cap `unit`, else see `_score`."""

    qk_scale: float
    unit: float
    cap: float


def logits_of(scale: float, softcap: float) -> Logits:
    """`scale` must be positive."""
    if softcap:
        return Logits(2 * LOG2E * scale / softcap, 1.0, softcap * LOG2E)
    return Logits(0.0, scale * LOG2E, 0.0)


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same products with a positive factor: the kernels scale a row's maximum after they took it."""
    return (q, scale) if scale > 0 else (-q, max(-scale, 1e-30))


def fp8_form(pages: torch.Tensor) -> int:
    """0: not fp8; 1: the chip converts e4m3 itself; 2: by its bits, before capability 8.9."""
    if pages.dtype != torch.float8_e4m3fn:
        return 0
    return 1 if capability(pages.device) >= 89 else 2


def page_options(k_pages: torch.Tensor, v_pages: torch.Tensor) -> dict[str, Any]:
    """The constexprs that pages decide."""
    return {
        "HEAD_DIM": k_pages.shape[3],
        "V_DIM": v_pages.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(k_pages.shape[3])),
        "BLOCK_V": max(16, triton.next_power_of_2(v_pages.shape[3])),
        "PAGE_SIZE": k_pages.shape[2],
        "FP8": fp8_form(k_pages),
    }


def as_bytes(pages: torch.Tensor) -> torch.Tensor:
    """fp8 pages as uint8, which every chip loads; others as they are."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


@triton.jit
def load_rows(ptr, rows, mask, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of dense rows of DIM; zeros past DIM and where the mask is off."""
    offsets = tl.arange(0, BLOCK)
    pointers = ptr + rows[:, None] * DIM + offsets[None, :]
    if DIM != BLOCK:
        keep = offsets[None, :] < DIM
        if MASKED:
            keep = keep & mask[:, None]
        return tl.load(pointers, mask=keep, other=0)
    if MASKED:
        return tl.load(pointers, mask=mask[:, None], other=0)
    return tl.load(pointers)


@triton.jit
def widen(values, FP8: tl.constexpr, dtype: tl.constexpr):
    """e4m3 bytes as `dtype`; others as they are."""
    if FP8 == 0:
        return values
    elif FP8 == 1:
        return values.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:  # an e4m3 has the bits of an fp16 of 2 ** -8 its value, subnormals too
        bits = values.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(dtype)


@triton.jit
def tile_rows(
    table_ptr, begin, mask, kv_head, num_kv_heads, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[BLOCK_N] int64 rows of the tokens from `begin`, a multiple of BLOCK_N: one page id where a page holds whole tiles."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table_ptr + begin // PAGE_SIZE).to(tl.int64)
        return (page * num_kv_heads + kv_head) * PAGE_SIZE + begin % PAGE_SIZE + tl.arange(0, BLOCK_N)
    tokens = begin + tl.arange(0, BLOCK_N)
    if MASKED:
        pages = tl.load(table_ptr + tokens // PAGE_SIZE, mask=mask, other=0)
    else:
        pages = tl.load(table_ptr + tokens // PAGE_SIZE)
    return (pages.to(tl.int64) * num_kv_heads + kv_head) * PAGE_SIZE + tokens % PAGE_SIZE


@triton.jit
def load_queries(
    q_ptr, places, heads, mask, token_stride, head_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """[rows, BLOCK_D]: row i is head heads[i] of token places[i], an int64; zeros where the mask is off."""
    dims = tl.arange(0, BLOCK_D)
    pointers = q_ptr + places[:, None] * token_stride + heads[:, None] * head_stride + dims[None, :]
    return tl.load(pointers, mask=mask[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def start_softmax(sinks_ptr, heads, mask, HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Running maximum and sum [ROWS], values [ROWS, BLOCK_V] before the first key: a sink is a key without a value."""
    row_max = tl.full([ROWS], LOWEST, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        row_max = tl.load(sinks_ptr + heads, mask=mask, other=0.0) / LN2
        row_sum += 1.0
    return row_max, row_sum, tl.zeros([ROWS, BLOCK_V], tl.float32)


@triton.jit
def finish_softmax(row_max, row_sum, acc):
    """Results, zeros for rows without keys, and base-2 logs of the sums, -inf for rows without keys and sink."""
    some = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc / some[:, None], tl.where(row_sum == 0.0, -float("inf"), row_max + tl.log2(some))


@triton.jit
def attend_tiles(
    q, row_max, row_sum, acc, begin, end, first, last, positions,
    k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr, kv_head, num_kv_heads, qk_scale, unit, cap, window,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, FP8: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the keys of tiles begin..end to a running softmax.

    Queries are [rows, BLOCK_D] at `positions` [rows] and see keys up to their own, within the window. MASKED: some tile has
    keys that some row does not see; only keys first..last are then loaded. Else every row sees every key of every tile.
    """
    for index in range(0, tl.cdiv(end - begin, BLOCK_N)):  # from 0: else the compiler loses the alignment of the rows
        tile = begin + index * BLOCK_N
        tokens = tile + tl.arange(0, BLOCK_N)
        held = tokens < last
        if HAS_WINDOW:
            held = held & (tokens >= first)
        rows = tile_rows(table_ptr, tile, held, kv_head, num_kv_heads, MASKED, PAGE_SIZE, BLOCK_N)
        k = load_rows(k_ptr, rows, held, MASKED, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, rows, held, MASKED, V_DIM, BLOCK_V)
        scores = tl.dot(q, tl.trans(widen(k, FP8, q.dtype)), input_precision="ieee")
        if FP8 != 0:
            if MASKED:
                scores *= tl.load(k_scales_ptr + rows, mask=held, other=0.0)[None, :]
            else:
                scores *= tl.load(k_scales_ptr + rows)[None, :]
        if HAS_CAP:  # cap * tanh(x): qk_scale makes 2 * log2(e) * x
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores * qk_scale) + 1.0))
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if HAS_WINDOW:
                seen = seen & (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
        weights = tl.exp2(scores * unit - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        if FP8 != 0:
            if MASKED:
                weights *= tl.load(v_scales_ptr + rows, mask=held, other=0.0)[None, :]
            else:
                weights *= tl.load(v_scales_ptr + rows)[None, :]
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), widen(v, FP8, q.dtype), acc, input_precision="ieee")
    return row_max, row_sum, acc
