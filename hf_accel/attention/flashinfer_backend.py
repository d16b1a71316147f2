"""Attention by FlashInfer on CUDA, where it is installed; what it does not compute exactly goes to the Triton kernels.

Owns which layers and steps FlashInfer serves. `flashinfer_plans` calls it.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel_kernels import mla, mla_torch, ops

from .base import AttentionBackend, AttentionBatch, AttentionMetadata
from .flashinfer_plans import CaptureError, Kind, StepPlans, Workspaces

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
LATENT = (512, 64)  # widths of a latent and a rotary key


@dataclass(frozen=True)
class FlashInferMetadata(AttentionMetadata):
    """A step's metadata with its plans, and what the other backend planned for the layers that go to it."""

    plans: StepPlans
    other: AttentionMetadata
    exact: bool  # no query of the step stands before its sequence's first key


def why_not_flashinfer() -> str:
    """ "" where the library can be imported, else the reason in words."""
    for name, remedy in (("flashinfer", "hf-accel[cuda]"), ("tvm_ffi", "apache-tvm-ffi")):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install {remedy}"
    try:
        import flashinfer
        import flashinfer.mla  # noqa: F401
    except Exception as error:  # of any sort: it looks for compilers and drivers
        return f"flashinfer cannot be imported: {type(error).__name__}: {error}"
    return ""


class FlashInferBackend(AttentionBackend):
    """FlashInfer 0.7.2 or newer.

    Layers with sinks, fp8 latents and latents of other widths than 512 + 64 go to `other`, always: the library ignores sinks in
    the kernels used here and has no scales for each row. A head_dim that it is not used for, or its failure to load, is an error
    if `strict`; else those layers go to `other` too, with one log line, and nothing is compiled for minutes.

    Args:
        other: serves the rest, on the same device.
        strict: FlashInfer was asked for by name.
    """

    name = "flashinfer"
    supports_graphs = True
    dtypes = frozenset({torch.bfloat16, torch.float16})

    def __init__(self, other: AttentionBackend, *, strict: bool) -> None:
        self.other, self.strict = other, strict
        self._workspaces = Workspaces()
        self._refused: dict[tuple[Kind, bool], str] = {}  # of a kind, for decode only or not

    def plan(self, batch: AttentionBatch) -> FlashInferMetadata:
        return self._metadata(batch, self.other.plan(batch), graph=False)

    def plan_graph(self, batch: AttentionBatch) -> FlashInferMetadata:
        return self._metadata(batch, self.other.plan_graph(batch), graph=True)

    def refresh_graph(self, metadata: AttentionMetadata, batch: AttentionBatch) -> None:
        assert isinstance(metadata, FlashInferMetadata)
        self.other.refresh_graph(metadata.other, batch)
        metadata.plans.refresh(super().plan(batch))

    def _metadata(self, batch: AttentionBatch, other: AttentionMetadata, *, graph: bool) -> FlashInferMetadata:
        plain = super().plan(batch)
        plans = StepPlans(plain, self._workspaces, graph=graph, strict=self.strict)
        lens = zip(plain.query_lens_cpu, plain.seq_lens_cpu, strict=True)
        return FlashInferMetadata(**vars(plain), plans=plans, other=other, exact=all(n <= total for n, total in lens))

    def store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
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
        assert isinstance(metadata, FlashInferMetadata)
        num_kv_heads, page_size, head_dim = k_pages.shape[1:]
        sizes = (q.shape[1], num_kv_heads, head_dim, 0, page_size)
        kind = Kind(*sizes, q.dtype, scale, sliding_window, softcap)
        if head_dim not in HEAD_DIMS or v_pages.shape[3] != head_dim:
            self._refuse(
                (kind, metadata.plans.only_decode),
                f"it serves head_dim {HEAD_DIMS}, not {head_dim} with values of {v_pages.shape[3]}",
            )
        if sinks is None and metadata.exact:
            wrapper = self._try(kind, metadata)
            if wrapper is not None:
                return wrapper.run(q=_dense(q), paged_kv_cache=(k_pages, v_pages))
        options = {"sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
        return self.other.attend(q, k_pages, v_pages, metadata.other, scale=scale, **options)

    def store_latents(
        self,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        pages: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:
        self.other.store_latents(latent, rope_key, pages, slot_mapping, scales)

    def absorbed_attention(
        self,
        q: torch.Tensor,
        weights: mla.AbsorbedWeights,
        pages: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        assert isinstance(metadata, FlashInferMetadata)
        page_size, rope = pages.shape[1], pages.shape[2] - weights.rank
        kind = Kind(weights.num_heads, 0, weights.rank, rope, page_size, q.dtype, scale, 0, 0.0)
        served = scales is None and (weights.rank, rope) == LATENT and metadata.exact
        # The library's causal bound is off by one key in tiles of 64 rows that end inside a token: such heads decode only.
        if served and (64 % kind.num_heads == 0 or kind.num_heads == 128 or max(metadata.query_lens_cpu) <= 1):
            wrapper = self._try(kind, metadata)
            if wrapper is not None:
                w_uk, w_uv = weights.views()
                latent_q = mla_torch.absorb(q, w_uk)
                return mla_torch.expand(wrapper.run(query=latent_q, kv_cache=pages), w_uv)
        return self.other.absorbed_attention(q, weights, pages, metadata.other, scale, scales)

    def expanded_attention(
        self, q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, nope_dim: int
    ) -> torch.Tensor:
        return self.other.expanded_attention(q, kv, rope_key, scale, nope_dim)

    def _try(self, kind: Kind, metadata: FlashInferMetadata) -> Any:
        """The planned wrapper of the library, or None where it fails."""
        key = (kind, metadata.plans.only_decode)
        if key in self._refused:
            return None
        try:
            return metadata.plans.wrapper(kind)
        except CaptureError:
            raise
        except Exception as error:  # of any sort: compilers, drivers and loaders speak here
            self._refuse(key, f"{type(error).__name__}: {error}", error)
            return None

    def _refuse(self, key: tuple[Kind, bool], reason: str, error: Exception | None = None) -> None:
        if self.strict:
            raise ValueError(
                f'the attention backend "flashinfer" cannot be used for this model: {reason}; choose "auto" or "{self.other.name}"'
            ) from error
        if not self._refused:
            remedy = '; attention_backend="flashinfer" lets it compile what is missing, for minutes' if error else ""
            logger.warning(
                "attention goes from flashinfer to %s for some layers: %s%s", self.other.name, reason, remedy
            )
        self._refused[key] = reason


def _dense(q: torch.Tensor) -> torch.Tensor:
    return q if q.stride(2) == 1 else q.contiguous()
