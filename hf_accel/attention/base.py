"""What an attention backend is: plan once a step, then one call for each layer.

Owns the contract and the metadata's shapes. Knows nothing about requests, the scheduler, or how a backend computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_accel_kernels.mla import AbsorbedWeights


@dataclass(frozen=True)
class AttentionMetadata:
    """Where one step's tokens stand and where their sequences' keys and values are; made once a step by `plan`."""

    page_table: torch.Tensor  # [num_seqs, max_pages] int32
    seq_lens: torch.Tensor  # [num_seqs] int32, including this step's tokens
    query_start_loc: torch.Tensor  # [num_seqs + 1] int32
    slot_mapping: torch.Tensor  # [num_tokens] int64, page * page_size + offset
    query_lens_cpu: tuple[int, ...]
    seq_lens_cpu: tuple[int, ...]


class AttentionBatch(Protocol):
    """What `plan` reads of a step's batch: `AttentionMetadata`'s fields, as attributes."""

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    query_lens_cpu: tuple[int, ...]
    seq_lens_cpu: tuple[int, ...]


class AttentionBackend(ABC):
    """Attention over paged keys and values. One instance serves every layer and may be called from several threads."""

    name: str
    supports_graphs: bool = False
    """Whether a decode step's calls may be captured in a CUDA graph and replayed after the planned buffers changed."""

    def plan(self, batch: AttentionBatch) -> AttentionMetadata:
        """The metadata of one step; a backend derives here, once, what every layer would derive again."""
        return AttentionMetadata(
            batch.page_table,
            batch.seq_lens,
            batch.query_start_loc,
            batch.slot_mapping,
            tuple(batch.query_lens_cpu),
            tuple(batch.seq_lens_cpu),
        )

    def plan_graph(self, batch: AttentionBatch) -> AttentionMetadata:
        """The metadata of a step to capture: its tensors are persistent buffers whose contents change before each replay.

        Its host lengths hold at capture only: what they bound must be bounded by the buffers' shapes instead.
        """
        return self.plan(batch)

    def refresh_graph(self, metadata: AttentionMetadata, batch: AttentionBatch) -> None:  # noqa: B027
        """Called before each replay of what was captured with `metadata`, whose buffers hold `batch` by now."""

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
        """`store` this step's keys and values, then `attend`; arguments are theirs."""
        self.store(k, v, k_pages, v_pages, metadata)
        return self.attend(
            q, k_pages, v_pages, metadata, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )

    @abstractmethod
    def store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        """Write this step's keys and values into their slots.

        Args:
            k: [num_tokens, num_kv_heads, head_dim], any strides.
            v: [num_tokens, num_kv_heads, v_head_dim], any strides.
            k_pages: [num_pages, num_kv_heads, page_size, head_dim]; written at the slots of `metadata`.
            v_pages: [num_pages, num_kv_heads, page_size, v_head_dim]; likewise.
        """

    @abstractmethod
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
        """Attend over pages that hold this step's keys and values already.

        Args:
            q: [num_tokens, num_heads, head_dim], any strides.
            k_pages: [num_pages, num_kv_heads, page_size, head_dim].
            v_pages: [num_pages, num_kv_heads, page_size, v_head_dim].
            scale: factor on the dot products.
            sliding_window: 0 for none; w: the token at position i sees positions (i - w, i].
            softcap: 0 for none; else logits become softcap * tanh(logits / softcap).
            sinks: [num_heads] or None; one more logit per head in the softmax's denominator.

        Returns:
            [num_tokens, num_heads, v_head_dim] of q's dtype.
        """

    # Layers that keep latents (MLA): called by `attention.latent`, which says which sequences take which form.

    @abstractmethod
    def store_latents(
        self,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        pages: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:
        """Write new tokens' latents [num_tokens, rank] and rotated keys [num_tokens, rope_dim]; see `mla.mla_store`."""

    @abstractmethod
    def absorbed_attention(
        self,
        q: torch.Tensor,
        weights: AbsorbedWeights,
        pages: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention in latent space: [num_tokens, num_heads, v_dim]; see `mla.mla_absorbed_attention`.

        `metadata` is what this backend planned for q's tokens: all of a step's, or those that attend absorbed.
        """

    @abstractmethod
    def expanded_attention(
        self, q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, nope_dim: int
    ) -> torch.Tensor:
        """Attention of one sequence's last tokens over its expanded latents; see `mla.mla_expanded_attention`."""
