"""Graphs without a GPU that bake in what CUDA's do: the operations of a captured step are written down with their tensors, and
a replay runs those, on those tensors, and nothing of the Python code around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_accel.attention.base import AttentionMetadata
from hf_accel.attention.torch_backend import TorchBackend
from hf_accel_kernels import mla_torch

BYTES_PER_GRAPH = 1000


class Recording(TorchDispatchMode):
    """The operations of one step, in order; what each made keeps its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.ops:
            for made, kept in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(recorded), strict=True):
                if isinstance(kept, torch.Tensor) and made.data_ptr() != kept.data_ptr():
                    kept.copy_(made)


class RecordingMaker:
    """As `CudaGraphMaker`. `fail` raises in the next captures; `num_released` counts what CUDA would free."""

    def __init__(self) -> None:
        self.captured: list[Recording] = []
        self.fail: Exception | None = None
        self.num_released = 0

    @property
    def num_bytes(self) -> int:
        return BYTES_PER_GRAPH * len(self.captured)

    def warm_up(self, step: Callable[[], Any]) -> Any:
        return step()

    def capture(self, step: Callable[[], object]) -> Recording:
        recording = Recording()
        with recording:
            step()
            if self.fail is not None:
                raise self.fail
        self.captured.append(recording)
        return recording

    def release(self) -> None:
        self.num_released += len(self.captured)
        self.captured.clear()


@dataclass(frozen=True)
class TableMetadata(AttentionMetadata):
    """Planned for a capture: its host lengths must not be read."""


class TableBackend(TorchBackend):
    """Decode rows as torch operations over the whole width of the page table, by lengths on the device; the rest as torch's.

    Keeps the host lengths that each replay was refreshed with.
    """

    name = "table"
    supports_graphs = True

    def __init__(self) -> None:
        self.refreshed: list[tuple[int, ...]] = []

    def plan_graph(self, batch: Any) -> TableMetadata:
        return TableMetadata(**vars(self.plan(batch)))

    def refresh_graph(self, metadata: AttentionMetadata, batch: Any) -> None:
        assert isinstance(metadata, TableMetadata) and metadata.page_table.data_ptr() == batch.page_table.data_ptr()
        self.refreshed.append(batch.seq_lens_cpu)

    def forward(self, q, k, v, k_pages, v_pages, metadata, *, scale, sliding_window=0, softcap=0.0, sinks=None):  # type: ignore[no-untyped-def]
        if not isinstance(metadata, TableMetadata):
            options = {"sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
            return super().forward(q, k, v, k_pages, v_pages, metadata, scale=scale, **options)
        page_size, group = k_pages.shape[2], q.shape[1] // k_pages.shape[1]
        where = (metadata.slot_mapping // page_size, slice(None), metadata.slot_mapping % page_size)
        k_pages[where], v_pages[where] = k, v
        keys, values = (_dense(pages, metadata.page_table).repeat_interleave(group, 1) for pages in (k_pages, v_pages))
        logits = torch.einsum("bhd,bhkd->bhk", q.float(), keys.float()) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        lens = metadata.seq_lens[:, None]
        seen = _seen(metadata, keys.shape[2])
        if sliding_window:
            seen = seen & (torch.arange(keys.shape[2])[None] >= lens - sliding_window)
        logits = torch.where(seen[:, None], logits, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[None, :, None].expand(len(logits), -1, 1)], 2)
        weights = torch.softmax(logits, -1)[..., : keys.shape[2]]
        values = torch.where(seen[:, None, :, None], values.float(), 0.0)  # what no token wrote may be NaN
        return torch.einsum("bhk,bhkd->bhd", weights, values).to(q.dtype)

    def store_latents(self, latent, rope_key, pages, slot_mapping, scales):  # type: ignore[no-untyped-def]
        assert scales is None
        pages[slot_mapping // pages.shape[1], slot_mapping % pages.shape[1]] = torch.cat([latent, rope_key], 1)

    def absorbed_attention(self, q, weights, pages, metadata, scale, scales):  # type: ignore[no-untyped-def]
        if not isinstance(metadata, TableMetadata):
            return super().absorbed_attention(q, weights, pages, metadata, scale, scales)
        w_uk, w_uv = weights.views()
        rows = pages[metadata.page_table.long()].flatten(1, 2)  # [num_seqs, width * page_size, rank + rope]
        seen = _seen(metadata, rows.shape[1])
        logits = torch.einsum("bhd,bkd->bhk", mla_torch.absorb(q, w_uk), rows) * scale
        shares = torch.softmax(torch.where(seen[:, None], logits, -torch.inf), -1)
        latents = torch.where(seen[..., None], rows[..., : weights.rank], 0.0)
        return mla_torch.expand(torch.einsum("bhk,bkd->bhd", shares, latents), w_uv)


def _dense(pages: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    """[num_seqs, num_kv_heads, width * page_size, dim]"""
    return pages[page_table.long()].transpose(1, 2).flatten(2, 3)


def _seen(metadata: AttentionMetadata, num_keys: int) -> torch.Tensor:
    return torch.arange(num_keys)[None] < metadata.seq_lens[:, None]
