"""The fused CPU ops in plain PyTorch: slow, right, and the oracle of their tests. Knows tensors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from hf_accel_kernels.fused import DecoderSpec, LayerWeights, Linear


def linear_reference(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    epilogue: str = "plain",
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The chain of tensor operations that `packed_linear` fuses.

    Args:
        x: [M, K].
        weights: [N_i, K] each; for epilogue "silu_mul" the gate and the up projection.
        biases: [N_i] each, or None.
        residual: [M, N], or [M, N / 2] for "silu_mul".

    Returns:
        [M, N] or [M, N / 2] of x's dtype.
    """
    biases = [None] * len(weights) if biases is None else biases
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    out = F.silu(parts[0]) * parts[1] if epilogue == "silu_mul" else torch.cat(parts, dim=1)
    if scale != 1.0:
        out = out * scale
    return out if residual is None else residual + out


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., size] scaled to unit mean square in float32, then times weight [size]."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, num_heads, head_dim], rotated in its first rotary_dim elements by cos, sin [T, rotary_dim] (rotate_half)."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = rotary.chunk(2, dim=-1)
    return torch.cat([rotary * cos + torch.cat([-right, left], dim=-1) * sin, rest], dim=-1)


def attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, sliding_window: int
) -> torch.Tensor:
    """Causal attention of the last Q of K tokens. query [Q, H, D], keys and values [K, HK, D] -> [Q, H, D]."""
    num_queries, num_keys, group = query.shape[0], keys.shape[0], query.shape[1] // keys.shape[1]
    keys, values = (t.float().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    position = torch.arange(num_keys - num_queries, num_keys).unsqueeze(1)
    distance = position - torch.arange(num_keys)  # [Q, K]
    hidden = (distance < 0) | (distance >= (sliding_window or num_keys + 1))
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, values).to(query.dtype)


def decoder_reference(
    spec: DecoderSpec,
    layers: Sequence[LayerWeights],
    embedding: torch.Tensor,
    final_norm: torch.Tensor,
    lm_head: Linear,
    cos: torch.Tensor,
    sin: torch.Tensor,
    input_ids: torch.Tensor,
) -> torch.Tensor:
    """Logits float32 [T, vocab_size] of one whole sequence input_ids [T], with no cache: the oracle of `FusedDecoder`."""
    num_tokens = input_ids.shape[0]
    hidden = embedding[input_ids] * spec.embedding_multiplier
    cos, sin = cos[:num_tokens], sin[:num_tokens]
    for layer in layers:
        x = rms_norm_reference(hidden, layer.input_norm, spec.norm_eps)
        q, k, v = (F.linear(x, *w).view(num_tokens, -1, spec.head_dim) for w in (layer.q, layer.k, layer.v))
        q = q if layer.q_norm is None else rms_norm_reference(q, layer.q_norm, spec.norm_eps)
        k = k if layer.k_norm is None else rms_norm_reference(k, layer.k_norm, spec.norm_eps)
        if layer.use_rope:
            q, k = rope_reference(q, cos, sin), rope_reference(k, cos, sin)
        x = attention_reference(q, k, v, layer.scale, layer.sliding_window).reshape(num_tokens, -1)
        hidden = hidden + F.linear(x, *layer.o) * spec.residual_multiplier
        x = rms_norm_reference(hidden, layer.post_norm, spec.norm_eps)
        x = F.silu(F.linear(x, *layer.gate)) * F.linear(x, *layer.up)
        hidden = hidden + F.linear(x, *layer.down) * spec.residual_multiplier
    logits = F.linear(rms_norm_reference(hidden, final_norm, spec.norm_eps), *lm_head)
    return (logits / spec.logits_divisor).float()
