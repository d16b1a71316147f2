"""Causal attention of a chunk over expanded keys and values as a Triton kernel. See `mla_expanded.mla_expanded_attention`.

Flash attention (arXiv 2307.08691) with a key in two parts: a head's own, read where kv_b_proj left it beside the head's value, and
the rotated one that all heads share. No mask and no whole key is ever made. Owns the table of configurations.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import capability, launch


def config(chip: int, element_size: int) -> tuple[int, int, int, int]:
    """(queries of a tile, keys of a tile, warps, stages)."""
    if element_size == 4:  # float32 never reaches tensor cores
        return 32, 32, 8, 1
    return (128, 64, 8, 3) if chip >= 90 else (128, 32, 8, 3)


def expanded_attention(
    q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, nope: int
) -> torch.Tensor:
    """`mla_expanded.mla_expanded_attention`; validates nothing."""
    (num_tokens, num_heads, head_dim), length = q.shape, kv.shape[0]
    rope, v = head_dim - nope, kv.shape[1] // num_heads - nope
    out = q.new_empty(num_tokens, num_heads, v)
    block_m, block_n, num_warps, num_stages = config(capability(q.device), q.element_size())
    launch(
        _prefill_kernel,
        (triton.cdiv(num_tokens, block_m), num_heads),
        q,
        kv,
        rope_key,
        out,
        scale * math.log2(math.e),
        num_tokens,
        length,
        *(*q.stride(), *kv.stride(), *rope_key.stride(), *out.stride()[:2]),
        NOPE=nope,
        NOPE_PAD=_pad(nope),
        ROPE=rope,
        ROPE_PAD=_pad(rope),
        V=v,
        V_PAD=_pad(v),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def _pad(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _load(base, stride_row, stride_column, rows, limit, WIDTH: tl.constexpr, PAD: tl.constexpr, CHECKED: tl.constexpr):
    """[rows, PAD]; zeros in rows from `limit` on, which are looked for if CHECKED, and in columns from WIDTH on."""
    columns = tl.arange(0, PAD)
    source = base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column
    if CHECKED:
        return tl.load(source, mask=(rows < limit)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if PAD != WIDTH:
        return tl.load(source, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(source)


@triton.jit
def _span(
    state,
    q,
    q_rope,
    bound,
    begin,
    end,
    length,
    k_ptr,
    v_ptr,
    rope_ptr,
    kv_row,
    kv_column,
    rope_row,
    rope_column,
    scale_log2,
    DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over keys begin..end, none of them hidden from a query unless MASKED."""
    highest, total, acc = state
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, kv_row, kv_column, n, length, DIMS[0], DIMS[1], MASKED)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if DIMS[2] > 0:
            rope = _load(rope_ptr, rope_row, rope_column, n, length, DIMS[2], DIMS[3], MASKED)
            logits = tl.dot(q_rope, tl.trans(rope), logits, input_precision="ieee")
        logits *= scale_log2
        if MASKED:
            logits = tl.where(n[None, :] < bound[:, None], logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        decay = tl.exp2(highest - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v = _load(v_ptr, kv_row, kv_column, n, length, DIMS[4], DIMS[5], MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        highest = higher
    return highest, total, acc


@triton.jit
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    rope_ptr,
    out_ptr,
    scale_log2,
    num_tokens,
    length,
    q_token,
    q_head,
    q_column,
    kv_row,
    kv_column,
    rope_row,
    rope_column,
    out_token,
    out_head,
    NOPE: tl.constexpr,
    NOPE_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every query sees a key, the first one, so no maximum stays at -inf."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the blocks that see most keys start first
    head = tl.program_id(1).to(tl.int64)
    token = first + tl.arange(0, BLOCK_M)
    q_row = q_ptr + head * q_head
    q = _load(q_row, q_token, q_column, token, num_tokens, NOPE, NOPE_PAD, True)
    q_rope = _load(q_row + NOPE * q_column, q_token, q_column, token, num_tokens, ROPE, ROPE_PAD, True)
    before = length - num_tokens + first  # keys that every query of the block sees
    everywhere = before // BLOCK_N * BLOCK_N
    k_ptr = kv_ptr + head * (NOPE + V) * kv_column
    v_ptr = k_ptr + NOPE * kv_column
    state = (
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, V_PAD], tl.float32),
    )
    bound = length - num_tokens + token + 1
    DIMS: tl.constexpr = (NOPE, NOPE_PAD, ROPE, ROPE_PAD, V, V_PAD)
    state = _span(
        state, q, q_rope, bound, 0, everywhere, length, k_ptr, v_ptr, rope_ptr, kv_row, kv_column, rope_row, rope_column,
        scale_log2, DIMS, BLOCK_N, False,
    )  # fmt: skip
    end = tl.minimum(before + BLOCK_M, length)
    state = _span(
        state, q, q_rope, bound, everywhere, end, length, k_ptr, v_ptr, rope_ptr, kv_row, kv_column, rope_row, rope_column,
        scale_log2, DIMS, BLOCK_N, True,
    )  # fmt: skip
    result = state[2] / state[1][:, None]
    columns = tl.arange(0, V_PAD)
    out = out_ptr + token.to(tl.int64)[:, None] * out_token + head * out_head + columns[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=(token < num_tokens)[:, None] & (columns < V)[None, :])
