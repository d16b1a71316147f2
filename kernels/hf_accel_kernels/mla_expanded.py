"""Latent attention with expanded keys and values, for long prefill, and when that form is the faster one.

Owns the layout of the expanded keys and values. Knows tensors only, not pages of latents.
"""

from __future__ import annotations

import torch

from . import ops
from .triton_ops.launch import why_not


def mla_expanded_attention(
    q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, *, nope: int
) -> torch.Tensor:
    """Causal attention of one sequence's last tokens over its expanded keys and values.

    Args:
        q: [num_tokens, num_heads, nope + rope], any strides.
        kv: [length, num_heads * (nope + v)] of q's dtype, kv_b_proj of the whole sequence's latents.
        rope_key: [length, rope] of q's dtype, the rotated key that all heads share.
        scale: factor on the dot products.
        nope: values of a head's query and key without a position.

    Returns:
        [num_tokens, num_heads, v] of q's dtype.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    num_tokens, num_heads, head_dim = q.shape
    length, rope = rope_key.shape
    if head_dim != nope + rope or kv.ndim != 2 or kv.shape[0] != length or kv.shape[1] % num_heads:
        raise ValueError(
            f"q {tuple(q.shape)}, kv {tuple(kv.shape)} and rope_key {tuple(rope_key.shape)} must be [num_tokens, "
            f"num_heads, nope + rope], [length, num_heads * (nope + v)] and [length, rope] for nope {nope}"
        )
    v = kv.shape[1] // num_heads - nope
    if v <= 0 or num_tokens > length or not q.dtype == kv.dtype == rope_key.dtype:
        raise ValueError(
            f"kv {tuple(kv.shape)} {kv.dtype} must hold {nope} + v values a head of {num_heads}, for at least "
            f"{num_tokens} rows of q's and rope_key's dtype ({q.dtype}, {rope_key.dtype})"
        )
    if not why_not(q.device):
        from .triton_ops import mla_prefill

        return mla_prefill.expanded_attention(q, kv, rope_key, scale, nope)
    per_head = kv.view(length, num_heads, nope + v).transpose(0, 1)  # [num_heads, length, nope + v]
    keys = q.new_empty(1, num_heads, length, head_dim)
    keys[0, :, :, :nope] = per_head[:, :, :nope]
    keys[0, :, :, nope:] = rope_key
    values = per_head[None, :, :, nope:].contiguous()
    lens = torch.tensor([[length, 0, num_tokens]], dtype=torch.int32, device=q.device)
    page_table = lens[:, 1:2]
    return ops.paged_attention(q, keys, values, page_table, lens[0, :1], lens[0, 1:], scale)


SHORT = 48  # new tokens that never pay for an expansion
LARGE = 1 << 16  # heads x tokens from which expanded keys and values are fresh memory at every call


def prefer_expanded(num_new: int, num_total: int, num_heads: int) -> bool:
    """Whether the expanded form (expansion included) beats the absorbed one on CPU for a sequence's chunk.

    Fitted to DeepSeek's sizes (rank 512, rope 64, nope 128, v 128), 16 and 128 heads, float32 and bfloat16, 16 to 1024
    new of 64 to 2048 tokens: the two forms cost the same where the pairs that attention saves and the absorption of the
    new tokens weigh as much as the expansion of all tokens. benchmarks/kernels/bench_mla.py prints prediction and truth.

    Args:
        num_new: the sequence's tokens in this step.
        num_total: its tokens including these.
        num_heads: attention heads.
    """
    pairs = num_new * num_total - num_new * num_new / 2
    expansion = num_total * (1.4 if num_heads * num_total > LARGE else 1.0)
    return num_new > SHORT and 0.0035 * pairs + 1.4 * num_new > expansion
