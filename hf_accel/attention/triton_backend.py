"""Attention by Triton kernels on CUDA: split decode rows, tiled prefill chunks, no host sync, graphs for decode.

Owns what is planned once a step: how many leading rows decode, and bounds of the kernels' grids. `hf_accel_kernels` computes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hf_accel_kernels import mla, ops
from hf_accel_kernels.triton_ops.launch import why_not

from .base import AttentionBackend, AttentionBatch, AttentionMetadata


@dataclass(frozen=True)
class TritonMetadata(AttentionMetadata):
    """A step's metadata with what bounds the kernels' grids."""

    num_decode_rows: int  # leading sequences of one token each
    max_query_len: int
    max_seq_len: int | None  # None: as many tokens as the page table's width allows


class TritonBackend(AttentionBackend):
    """The Triton kernels, on a CUDA device of capability 8.0 or newer.

    Args:
        device: it will run on; None skips the check, for tests that interpret the kernels.

    Raises:
        ValueError: they cannot run there.
    """

    name = "triton"
    supports_graphs = True
    dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def __init__(self, device: torch.device | None = None) -> None:
        reason = why_not(device) if device is not None else ""
        if reason:
            raise ValueError(reason)

    def plan(self, batch: AttentionBatch) -> TritonMetadata:
        query_lens, seq_lens = tuple(batch.query_lens_cpu), tuple(batch.seq_lens_cpu)
        num_decode_rows = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
        return TritonMetadata(
            batch.page_table,
            batch.seq_lens,
            batch.query_start_loc,
            batch.slot_mapping,
            query_lens,
            seq_lens,
            num_decode_rows=num_decode_rows,
            max_query_len=max(query_lens, default=0),
            max_seq_len=max(seq_lens, default=0),
        )

    def plan_graph(self, batch: AttentionBatch) -> TritonMetadata:
        return dataclasses.replace(self.plan(batch), max_seq_len=None)

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
        self.store(k, v, k_pages, v_pages, metadata)
        return self.attend(
            q, k_pages, v_pages, metadata, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )

    def store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        """Write this step's keys and values into their slots; see `ops.store_kv`."""
        ops.store_kv(k, v, k_pages, v_pages, metadata.slot_mapping)

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
        """Attend over pages that hold this step's keys and values already."""
        assert isinstance(metadata, TritonMetadata)
        rows = (metadata.page_table, metadata.seq_lens, metadata.query_start_loc)
        return ops.paged_attention(
            q,
            k_pages,
            v_pages,
            *rows,
            scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            num_decode_rows=metadata.num_decode_rows,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
        )

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
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = (page_table, seq_lens, query_start_loc)
        return mla.mla_absorbed_attention(q, weights, pages, *rows, scale, scales=scales)

    def expanded_attention(
        self, q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, nope_dim: int
    ) -> torch.Tensor:
        return mla.mla_expanded_attention(q, kv, rope_key, scale, nope=nope_dim)
