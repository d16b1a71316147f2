"""Attention by plain torch ops, on any device: the backend that is always there, and the one the others are held to.

Owns nothing but the calls; `hf_accel_kernels.torch_attention` computes.
"""

from __future__ import annotations

import torch

from hf_accel_kernels import torch_attention

from .base import AttentionBackend, AttentionMetadata


class TorchBackend(AttentionBackend):
    """`scaled_dot_product_attention` over gathered pages; an explicit fp32 softmax where softcap or sinks need one."""

    name = "torch"

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        torch_attention.store_kv(k, v, k_pages, v_pages, metadata.slot_mapping)
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
