"""FlashInfer's wrappers for one step: which are needed, their plans, and the page tables as it reads them.

Owns every call of the library; written against 0.7.2. A wrapper is planned once for each kind of layer and step, from lengths on
the host; only page ids stay on the device. Knows no layer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .base import AttentionMetadata

WORKSPACE_BYTES = 128 << 20
PLAN_BYTES = 8 << 20  # as the library's own
TENSOR_CORE_GROUP = 4  # query heads of a kv head from which decode pays for tensor cores


@dataclass(frozen=True)
class Kind:
    """What a plan depends on beside the step: layers that share all of it share a wrapper.

    `head_dim` is the latent's width and `rope_dim` the rotary key's for latent attention, where num_kv_heads is 0.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int
    page_size: int
    dtype: torch.dtype
    scale: float
    window: int
    softcap: float

    @property
    def tensor_cores(self) -> bool:
        """Whether decode goes through the kernel that packs the heads of a group into a matrix."""
        return self.num_heads // self.num_kv_heads >= TENSOR_CORE_GROUP


class Tables:
    """A step's sequences as compressed rows: offsets and lengths on the host, page ids on the device."""

    def __init__(self, metadata: AttentionMetadata, page_size: int) -> None:
        pairs = list(zip(metadata.query_lens_cpu, metadata.seq_lens_cpu, strict=True))
        self.kept = [i for i, (query_len, _) in enumerate(pairs) if query_len]
        query_lens, seq_lens = ([pairs[i][side] for i in self.kept] for side in (0, 1))
        counts = [-(-n // page_size) for n in seq_lens]
        self.qo_indptr, self.kv_indptr = _offsets(query_lens), _offsets(counts)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        last = [n - (count - 1) * page_size if count else 0 for n, count in zip(seq_lens, counts)]
        self.last_page_len = torch.tensor(last, dtype=torch.int32)
        self.only_decode = max(query_lens, default=0) <= 1
        self.indices = self._page_ids(metadata, page_size, sum(counts), len(pairs))

    def _page_ids(self, metadata: AttentionMetadata, page_size: int, total: int, num_seqs: int) -> torch.Tensor:
        """[total] int32, every sequence's pages in order; computed on the device, whose work nobody waits for."""
        table, lens = metadata.page_table, metadata.seq_lens
        if len(self.kept) < num_seqs:
            kept = torch.tensor(self.kept).to(table.device, non_blocking=True)
            table, lens = table[kept], lens[kept]
        counts = (lens.long() + (page_size - 1)) // page_size
        row = torch.repeat_interleave(counts, output_size=total)
        column = torch.arange(total, device=table.device) - (counts.cumsum(0) - counts)[row]
        return table[row, column].to(torch.int32)


def _offsets(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


class Wrapper:
    """One of the library's wrappers, planned again for every step.

    The library copies a plan from one pinned buffer; it may be written again only when the copy before has been made.
    """

    def __init__(self, library: Any, device: torch.device) -> None:
        self.library, self.device = library, device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._used = False

    def plan(self, **arguments: Any) -> None:
        if self._copied is not None and self._used:
            self._copied.synchronize()
        self.library.plan(**arguments)
        if self._copied is not None:
            self._copied.record()
        self._used = True


class CaptureError(RuntimeError):
    """A plan was wanted while a graph was being captured."""


class Workspaces(threading.local):
    """What the wrappers of one thread share: the library's scratch memory, and the wrappers of steps that are not captured."""

    def __init__(self) -> None:
        self.scratch: dict[torch.device, torch.Tensor] = {}
        self.wrappers: dict[tuple[str, Kind], Wrapper] = {}
        self.plan_buffers: dict[Kind, torch.Tensor] = {}

    def scratch_on(self, device: torch.device) -> torch.Tensor:
        """[WORKSPACE_BYTES] uint8, zeros before its first use as the library wants it."""
        if device not in self.scratch:
            self.scratch[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return self.scratch[device]

    def share_plan_buffer(self, library: Any, kind: Kind, device: torch.device) -> None:
        """Let the captured decode steps of all sizes keep their plan in one place: each is planned before each replay."""
        if kind not in self.plan_buffers:
            self.plan_buffers[kind] = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device)
        library.reset_workspace_buffer(
            float_workspace_buffer=self.scratch_on(device), int_workspace_buffer=self.plan_buffers[kind]
        )


class GraphBuffers:
    """Tables at addresses that a captured graph reads, for a batch of `num_seqs` decode rows of up to `num_pages` each."""

    def __init__(self, num_seqs: int, num_pages: int, device: torch.device) -> None:
        def empty(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.qo_indptr = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        self.kv_indptr, self.indices = empty(num_seqs + 1), empty(num_seqs * num_pages)
        self.last_page_len, self.seq_lens = empty(num_seqs), empty(num_seqs)

    def arguments(self, shape: str) -> dict[str, Any]:
        """As the wrapper of a "decode" or "mla" step takes them."""
        if shape == "mla":
            names = {"qo_indptr": self.qo_indptr, "kv_indptr": self.kv_indptr}
            names |= {"kv_indices": self.indices, "kv_len_arr": self.seq_lens}
        else:
            names = {"paged_kv_indptr_buffer": self.kv_indptr, "paged_kv_indices_buffer": self.indices}
            names |= {"paged_kv_last_page_len_buffer": self.last_page_len}
        return {"use_cuda_graph": True, **names}


class StepPlans:
    """The plans of one step, made when a layer first asks; of a captured step, made again before each replay."""

    def __init__(self, metadata: AttentionMetadata, workspaces: Workspaces, *, graph: bool) -> None:
        self.metadata, self.workspaces, self.graph = metadata, workspaces, graph
        self.device = metadata.seq_lens.device
        self._tables: dict[int, Tables] = {}
        self._planned: dict[Kind, Wrapper] = {}
        self._buffers: dict[int, GraphBuffers] = {}

    def wrapper(self, kind: Kind) -> Any:
        """The library's wrapper for layers of `kind`, planned for this step."""
        planned = self._planned.get(kind)
        if planned is None:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise CaptureError("a plan cannot be made while a graph is captured: run the step once before")
            planned = self._plan(kind, self._wrapper_for(kind))
            self._planned[kind] = planned
        return planned.library

    def refresh(self, metadata: AttentionMetadata) -> None:
        """Plan everything again for other lengths of the same rows."""
        self.metadata = metadata
        self._tables.clear()
        for kind, wrapper in self._planned.items():
            self._plan(kind, wrapper)

    def tables(self, page_size: int) -> Tables:
        if page_size not in self._tables:
            self._tables[page_size] = Tables(self.metadata, page_size)
        return self._tables[page_size]

    def _wrapper_for(self, kind: Kind) -> Wrapper:
        shape = "mla" if not kind.num_kv_heads else ("decode" if self.tables(kind.page_size).only_decode else "prefill")
        if self.graph:
            return self._new(shape, kind)
        wrappers = self.workspaces.wrappers
        if (shape, kind) not in wrappers:
            wrappers[shape, kind] = self._new(shape, kind)
        return wrappers[shape, kind]

    def _new(self, shape: str, kind: Kind) -> Wrapper:
        import flashinfer

        scratch = self.workspaces.scratch_on(self.device)
        own = self._graph_buffers(kind.page_size).arguments(shape) if self.graph else {}
        library: Any
        if shape == "mla":
            library = flashinfer.mla.BatchMLAPagedAttentionWrapper(
                float_workspace_buffer=scratch, backend="auto", **own
            )
        elif shape == "decode":
            library = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                float_workspace_buffer=scratch,
                kv_layout="HND",
                use_tensor_cores=kind.tensor_cores,
                backend="fa2",
                **own,
            )
            if self.graph:
                self.workspaces.share_plan_buffer(library, kind, self.device)
        else:
            assert not self.graph, "captured steps decode only"
            library = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer=scratch, kv_layout="HND", backend="auto"
            )
        return Wrapper(library, self.device)

    def _graph_buffers(self, page_size: int) -> GraphBuffers:
        if page_size not in self._buffers:
            self._buffers[page_size] = GraphBuffers(*self.metadata.page_table.shape, self.device)
        return self._buffers[page_size]

    def _plan(self, kind: Kind, wrapper: Wrapper) -> Wrapper:
        tables = self.tables(kind.page_size)
        if not kind.num_kv_heads:
            plan_latent(wrapper, tables, kind)
            return wrapper
        sizes = {"num_qo_heads": kind.num_heads, "num_kv_heads": kind.num_kv_heads, "page_size": kind.page_size}
        options = {
            "sm_scale": kind.scale,
            "window_left": kind.window - 1 if kind.window else -1,
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.dtype,
        }
        if tables.only_decode:
            wrapper.plan(
                indptr=tables.kv_indptr,
                indices=tables.indices,
                last_page_len=tables.last_page_len,
                head_dim=kind.head_dim,
                **sizes,
                **options,
            )
            return wrapper
        wrapper.plan(
            qo_indptr=tables.qo_indptr,
            paged_kv_indptr=tables.kv_indptr,
            paged_kv_indices=tables.indices,
            paged_kv_last_page_len=tables.last_page_len,
            head_dim_qk=kind.head_dim,
            causal=True,
            **sizes,
            **options,
        )
        return wrapper


def plan_latent(wrapper: Wrapper, tables: Tables, kind: Kind) -> None:
    """Plan latent attention: packed queries and pages, causal where a sequence has several queries."""
    import flashinfer

    wrapper.plan(
        metadata=flashinfer.mla.MLAPlanMetadata.csr(
            qo_indptr=tables.qo_indptr,
            kv_indptr=tables.kv_indptr,
            kv_indices=tables.indices,
            kv_len_arr=tables.seq_lens,
        ),
        num_heads=kind.num_heads,
        head_dim_ckv=kind.head_dim,
        head_dim_kpe=kind.rope_dim,
        page_size=kind.page_size,
        causal=not tables.only_decode,
        sm_scale=kind.scale,
        q_data_type=kind.dtype,
        kv_data_type=kind.dtype,
    )
