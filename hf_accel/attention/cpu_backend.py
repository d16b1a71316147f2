"""Attention by the C++ op on CPU: no padding, no gather, prefill chunks and decode rows in one call.

Owns nothing but the calls; `hf_accel_kernels.cpu.attention` holds the library. The op reads the metadata's tensors
directly, so `plan` checks their dtype and layout once a step.
"""

from __future__ import annotations

import torch

from hf_accel_kernels import mla
from hf_accel_kernels.cpu.attention import DTYPES, CpuAttention

from .base import AttentionBackend, AttentionBatch, AttentionMetadata


class CpuBackend(AttentionBackend):
    """The C++ ops. Raises RuntimeError, with the reason, where they cannot be built or loaded."""

    name = "cpu"
    supports_graphs = True  # the ops read lengths and pages from tensors only
    dtypes = frozenset(DTYPES)

    def __init__(self) -> None:
        self._ops = CpuAttention()

    def plan(self, batch: AttentionBatch) -> AttentionMetadata:
        metadata = super().plan(batch)
        num_seqs = len(metadata.query_lens_cpu)
        assert metadata.page_table.dtype == torch.int32 and metadata.page_table.stride(1) == 1
        assert metadata.seq_lens.dtype == torch.int32 and metadata.seq_lens.is_contiguous()
        assert metadata.query_start_loc.dtype == torch.int32 and metadata.query_start_loc.is_contiguous()
        assert metadata.slot_mapping.dtype == torch.int64 and metadata.slot_mapping.is_contiguous()
        assert metadata.seq_lens.shape == (num_seqs,) and metadata.query_start_loc.shape == (num_seqs + 1,)
        return metadata

    def store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (k, v))
        self._ops.store_kv(k, v, k_pages, v_pages, metadata.slot_mapping)

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
        q = q if q.stride(2) == 1 else q.contiguous()
        if sinks is not None and (sinks.dtype != torch.float32 or not sinks.is_contiguous()):
            sinks = sinks.float().contiguous()
        out = torch.empty((q.shape[0], q.shape[1], v_pages.shape[3]), dtype=q.dtype)
        self._ops.paged_attention(
            q,
            k_pages,
            v_pages,
            metadata.page_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            scale,
            sliding_window,
            softcap,
            sinks,
            out,
        )
        return out

    def store_latents(
        self,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        pages: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:
        mla.mla_store(latent, rope_key, pages, slot_mapping, scales)

    def absorbed_attention(
        self,
        q: torch.Tensor,
        weights: mla.AbsorbedWeights,
        pages: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = (metadata.page_table, metadata.seq_lens, metadata.query_start_loc)
        return mla.mla_absorbed_attention(q, weights, pages, *rows, scale, scales=scales)

    def expanded_attention(
        self, q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, nope_dim: int
    ) -> torch.Tensor:
        return mla.mla_expanded_attention(q, kv, rope_key, scale, nope=nope_dim)
