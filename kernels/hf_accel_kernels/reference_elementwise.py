"""The ops between a layer's products, one token and head at a time: the oracle of their tests. Knows tensors only."""

from __future__ import annotations

import torch

from . import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rms_norm.rms_norm`; the mean square in float64."""
    out = torch.empty_like(x)
    for row, values in enumerate(x):
        mean = values.double().square().mean().float()
        out[row] = weight * (values.float() * torch.rsqrt(mean + eps)).to(x.dtype)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rms_norm.add_rms_norm`."""
    scaled = (x.float() * scale).to(x.dtype)
    total = (residual.float() + scaled.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See `swiglu.swiglu`; silu in float64."""
    gate, up = gate_up.tensor_split(2, dim=1)
    wide = gate.double()
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up


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
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rope_and_store.rope_and_store`."""
    prepared = []
    for heads, weight in ((q, q_norm), (k, k_norm)):
        result = heads.clone()
        for token in range(heads.shape[0]):
            for head in range(heads.shape[1]):
                x = heads[token, head]
                if weight is not None:
                    x = rms_norm(x[None], weight, eps)[0]
                if cos is not None and sin is not None:
                    x = _rotate(x, cos[positions[token]].to(x.dtype), sin[positions[token]].to(x.dtype))
                result[token, head] = x
        prepared.append(result)
    q, k = prepared
    reference.store_kv(k, v, k_pages, v_pages, slot_mapping, k_scales=k_scales, v_scales=v_scales)
    return q


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [head_dim] by the angles of cos, sin [rotary_dim]."""
    rotated, half = x.clone(), len(cos) // 2
    for i in range(half):
        low, high = x[i], x[i + half]
        rotated[i] = low * cos[i] + (-high) * sin[i]
        rotated[i + half] = high * cos[i + half] + low * sin[i + half]
    return rotated
