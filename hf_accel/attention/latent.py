"""Attention over paged latents (MLA): which sequences attend absorbed and which expanded, and the calls of either.

Absorbed: queries go into latent space, every cached row is read once for all heads; right for decode and short chunks.
Expanded: a long chunk's whole context is expanded to keys and values once, which costs fewer operations a pair. Both give
the same answer (DeepSeek-V2, arXiv 2405.04434). Owns the split of a batch; knows tensors and one layer's weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hf_accel_kernels import mla
from hf_accel_kernels.mla import AbsorbedWeights

from .base import AttentionBackend, AttentionMetadata


@dataclass(frozen=True)
class LatentLayer:
    """One layer's pages and what turns latents into keys and values.

    Attributes:
        pages: [num_pages, page_size, rank + rope_dim] of the model's dtype, or fp8 with `scales`.
        scales: [num_pages, page_size, 2] float32, or None.
        weights: the absorbed form of `expand`, or None where it is no plain product: every sequence is then expanded.
        expand: latents [num_tokens, rank] -> [num_tokens, num_heads * (nope_dim + v_dim)].
        nope_dim: values of a head's query and key without a position.
        v_dim: values of a head's output.
    """

    pages: torch.Tensor
    scales: torch.Tensor | None
    weights: AbsorbedWeights | None
    expand: Callable[[torch.Tensor], torch.Tensor]
    nope_dim: int
    v_dim: int


@dataclass
class _Rows:
    """Some of a step's sequences as a batch of their own."""

    tokens: torch.Tensor | None  # [num_tokens] int64 rows of the step; None: all of them
    metadata: AttentionMetadata
    planned: bool  # by the backend that attends

    def plan(self, backend: AttentionBackend) -> AttentionMetadata:
        """The backend's own metadata of these rows, made at the first layer."""
        if not self.planned:
            self.metadata, self.planned = backend.plan(self.metadata), True
        return self.metadata


class LatentPlan:
    """How one step's sequences attend, derived once for all layers.

    Args:
        metadata: of the step.
        num_heads: query heads.
        absorb: False where the absorbed form is not to be had.
    """

    def __init__(self, metadata: AttentionMetadata, num_heads: int, *, absorb: bool = True) -> None:
        pairs = list(zip(metadata.query_lens_cpu, metadata.seq_lens_cpu, strict=True))
        self.expanded = [
            i for i, (new, total) in enumerate(pairs) if not absorb or mla.prefer_expanded(new, total, num_heads)
        ]
        self.starts = [0]
        for new, _ in pairs:
            self.starts.append(self.starts[-1] + new)
        self.absorbed = self._rows(metadata, sorted(set(range(len(pairs))) - set(self.expanded)))

    def _rows(self, metadata: AttentionMetadata, kept: Sequence[int]) -> _Rows | None:
        if not kept:
            return None
        if not self.expanded:
            return _Rows(None, metadata, planned=True)
        device = metadata.seq_lens.device
        tokens = [t for i in kept for t in range(self.starts[i], self.starts[i + 1])]
        lens = torch.tensor([0, *(metadata.query_lens_cpu[i] for i in kept)], dtype=torch.int32)
        rows, index = torch.tensor(kept, device=device), torch.tensor(tokens, device=device)
        chosen = AttentionMetadata(
            metadata.page_table[rows],
            metadata.seq_lens[rows],
            lens.cumsum(0, dtype=torch.int32).to(device),
            metadata.slot_mapping[index],
            tuple(metadata.query_lens_cpu[i] for i in kept),
            tuple(metadata.seq_lens_cpu[i] for i in kept),
        )
        return _Rows(index, chosen, planned=False)


def attend_latent(
    backend: AttentionBackend,
    q: torch.Tensor,
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    layer: LatentLayer,
    plan: LatentPlan,
    metadata: AttentionMetadata,
    *,
    scale: float,
) -> torch.Tensor:
    """Store this step's latents, then attend.

    Args:
        backend: computes.
        q: [num_tokens, num_heads, nope_dim + rope_dim], any strides.
        latent: [num_tokens, rank], normed.
        rope_key: [num_tokens, rope_dim], rotated.
        layer: its pages, written at the slots of `metadata`, and weights.
        plan: of this step, for layers whose `weights` are as this one's (there, or not).
        metadata: of this step.
        scale: factor on the dot products.

    Returns:
        [num_tokens, num_heads, v_dim] of q's dtype.
    """
    backend.store_latents(latent, rope_key, layer.pages, metadata.slot_mapping, layer.scales)
    rows = plan.absorbed
    if rows is not None and rows.tokens is None:
        return _absorbed(backend, q, layer, rows, scale)
    out = q.new_empty(q.shape[0], q.shape[1], layer.v_dim)
    if rows is not None:
        out[rows.tokens] = _absorbed(backend, q[rows.tokens], layer, rows, scale)
    page_size = layer.pages.shape[1]
    for i in plan.expanded:
        tokens, length = slice(plan.starts[i], plan.starts[i + 1]), metadata.seq_lens_cpu[i]
        page_ids = metadata.page_table[i, : -(-length // page_size)]
        held = mla.mla_gather(layer.pages, page_ids, length, layer.scales, dtype=q.dtype, rank=latent.shape[1])
        out[tokens] = backend.expanded_attention(q[tokens], layer.expand(held[0]), held[1], scale, layer.nope_dim)
    return out


def _absorbed(
    backend: AttentionBackend, q: torch.Tensor, layer: LatentLayer, rows: _Rows, scale: float
) -> torch.Tensor:
    assert layer.weights is not None, "planned as absorbed without absorbed weights"
    return backend.absorbed_attention(q, layer.weights, layer.pages, rows.plan(backend), scale, layer.scales)
