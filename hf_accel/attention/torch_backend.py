"""Attention by plain torch ops, on any device: the backend that is always there, and the one the others are held to.

Owns nothing but the calls; `hf_accel_kernels.torch_attention` computes.
"""

from __future__ import annotations

import torch

from hf_accel_kernels import mla_torch, torch_attention
from hf_accel_kernels.mla import AbsorbedWeights

from .base import AttentionBackend, AttentionMetadata


class TorchBackend(AttentionBackend):
    """`scaled_dot_product_attention` over gathered pages; an explicit fp32 softmax where softcap or sinks need one."""

    name = "torch"

    def store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        torch_attention.store_kv(k, v, k_pages, v_pages, metadata.slot_mapping)

    def attend(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return torch_attention.paged_attention(
            q,
            k_pages,
            v_pages,
            metadata.page_table,
            metadata.seq_lens,
            metadata.query_lens_cpu,
            metadata.seq_lens_cpu,
            scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )

    def store_latents(
        self,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        pages: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:
        mla_torch.mla_store(latent, rope_key, pages, slot_mapping, scales)

    def absorbed_attention(
        self,
        q: torch.Tensor,
        weights: AbsorbedWeights,
        pages: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        w_uk, w_uv = weights.views()
        o_lat = q.new_empty(q.shape[0], q.shape[1], weights.rank)
        rows = (metadata.page_table, metadata.seq_lens, metadata.query_start_loc)
        mla_torch.mla_attention(mla_torch.absorb(q, w_uk), pages, *rows, scale, weights.rank, scales, o_lat)
        return mla_torch.expand(o_lat, w_uv)

    def expanded_attention(
        self, q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, nope_dim: int
    ) -> torch.Tensor:
        return mla_torch.expanded_attention(q, kv, rope_key, scale, nope_dim)
