"""The `forward_batch` keyword of one step: sends each layer's attention to the pages it belongs to.

Owns the translation from what a layer passes to what a backend takes. Lives for one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_accel.attention.base import AttentionBackend, AttentionMetadata
from hf_accel.attention.latent import LatentLayer, LatentPlan, attend_latent
from hf_accel.kv_cache.pool import MHAPool


class PagedStep:
    """Layers that keep keys and values."""

    def __init__(self, backend: AttentionBackend, pool: MHAPool, metadata: AttentionMetadata) -> None:
        self.backend, self.pool, self.metadata = backend, pool, metadata

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """See `patching.attention.LayerAttention`."""
        layer = module.layer_idx
        sinks = options.get("s_aux")
        out = self.backend.forward(
            query[0].transpose(0, 1),  # [num_tokens, num_heads, head_dim]
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self.pool.k_pages[layer],
            self.pool.v_pages[layer],
            self.metadata,
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            sliding_window=options.get("sliding_window") or 0,
            softcap=options.get("softcap") or 0.0,
            sinks=None if sinks is None else sinks.detach().float(),
        )
        return out[None]


class LatentStep:
    """Layers that keep latents: the key they pass is this step's latents, the value its rotated keys."""

    def __init__(
        self, backend: AttentionBackend, layers: Mapping[int, LatentLayer], metadata: AttentionMetadata
    ) -> None:
        self.backend, self.layers, self.metadata = backend, layers, metadata
        self._plans: dict[bool, LatentPlan] = {}

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """See `patching.attention.LayerAttention`."""
        layer = self.layers[module.layer_idx]
        absorb = layer.weights is not None
        plan = self._plans.get(absorb)
        if plan is None:
            plan = self._plans[absorb] = LatentPlan(self.metadata, query.shape[1], absorb=absorb)
        out = attend_latent(
            self.backend,
            query[0].transpose(0, 1),  # [num_tokens, num_heads, nope_dim + rope_dim]
            key[0, 0],
            value[0, 0],
            layer,
            plan,
            self.metadata,
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        )
        return out[None]
