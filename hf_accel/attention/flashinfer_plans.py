"""FlashInfer's wrappers for one step: which are needed, and their plans.

Owns every call of the library, and which of its modules may be loaded; written against 0.7.2. A wrapper is planned once for each kind of layer and step, from lengths on
the host; only page ids stay on the device. Knows no layer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .base import AttentionMetadata
from .flashinfer_tables import GraphBuffers, Tables

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 384 << 20  # the parts of long prefills with many heads overflow the usual 128 MiB
PLAN_BYTES = 8 << 20  # as the library's own
TENSOR_CORE_GROUP = 4  # query heads of a kv head from which decode pays for tensor cores
CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8, 16)  # that the other decode kernel exists for
NO_COMPILER = "FLASHINFER_DISABLE_JIT"  # the library's switch


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

    def shapes(self, only_decode: bool) -> tuple[str, ...]:
        """Wrappers that compute it, the preferred one first.

        "decode_packed" is prefill's kernel, which packs the heads of a group into a matrix; it is a module of its own, which may
        be missing where "decode" is not.
        """
        if not self.num_kv_heads:
            return ("mla",)
        if not only_decode:
            return ("prefill",)
        group = self.num_heads // self.num_kv_heads
        if group < TENSOR_CORE_GROUP:
            return ("decode",)
        return ("decode_packed", "decode") if group in CUDA_CORE_GROUPS else ("decode_packed",)


class Wrapper:
    """One of the library's wrappers, planned again for every step.

    The library copies a plan from one pinned buffer; it may be written again only when the copy before has been made.
    """

    def __init__(self, library: Any, device: torch.device) -> None:
        self.library, self.device = library, device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._used = False
        self.step: object = None  # whose plan it holds

    def plan(self, **arguments: Any) -> None:
        if self._copied is not None and self._used:
            self._copied.synchronize()
        self.library.plan(**arguments)
        if self._copied is not None:
            self._copied.record()
        self._used = True


class CaptureError(RuntimeError):
    """A plan was wanted while a graph was being captured."""


_loading = threading.Lock()


@contextlib.contextmanager
def loading(*, compiles: bool) -> Iterator[None]:
    """While open, the library may load modules, and with `compiles` also compile them, which takes minutes."""
    with _loading:
        before = os.environ.get(NO_COMPILER)
        if not compiles:
            os.environ[NO_COMPILER] = "1"
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(NO_COMPILER, None)
            else:
                os.environ[NO_COMPILER] = before


class Workspaces(threading.local):
    """What the wrappers of one thread share: the library's scratch memory, and the wrappers of steps that are not captured."""

    def __init__(self) -> None:
        self.scratch: dict[torch.device, torch.Tensor] = {}
        self.wrappers: dict[tuple[str, Kind], Wrapper] = {}
        self.plan_buffers: dict[Kind, torch.Tensor] = {}
        self.missing: set[tuple[str, Kind]] = set()

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


class StepPlans:
    """The plans of one step, made when a layer first asks; of a captured step, made again before each replay.

    With `strict` the library is to serve whatever it can, if need be by compiling or a slower kernel.
    """

    def __init__(
        self, metadata: AttentionMetadata, workspaces: Workspaces, *, graph: bool = False, strict: bool = True
    ) -> None:
        self.metadata, self.workspaces, self.graph, self.strict = metadata, workspaces, graph, strict
        self.device = metadata.seq_lens.device
        self.only_decode = max(metadata.query_lens_cpu, default=0) <= 1
        self._tables: dict[int, Tables] = {}
        self._planned: dict[Kind, Wrapper] = {}
        self._buffers: dict[int, GraphBuffers] = {}

    def wrapper(self, kind: Kind) -> Any:
        """The library's wrapper for layers of `kind`, planned for this step. Raises whatever the library raises."""
        planned = self._planned.get(kind)
        if planned is None or planned.step is not self:  # another step may have planned it in between
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise CaptureError("a plan cannot be made while a graph is captured: run the step once before")
            planned = self._planned[kind] = self._first_plan(kind)
        return planned.library

    def _first_plan(self, kind: Kind) -> Wrapper:
        shapes, missing = kind.shapes(self.only_decode), self.workspaces.missing
        if not self.strict:
            shapes = shapes[:1]  # the caller has kernels that are faster than the second best here
        for shape in shapes:
            if (shape, kind) in missing and shape != shapes[-1]:
                continue
            try:
                with loading(compiles=self.strict):
                    return self._plan(kind, self._wrapper_for(shape, kind))
            except Exception as error:
                if shape == shapes[-1]:
                    raise
                missing.add((shape, kind))
                logger.info("flashinfer decodes without tensor cores: %s: %s", type(error).__name__, error)
        raise AssertionError("a kind has at least one shape")

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

    def _wrapper_for(self, shape: str, kind: Kind) -> Wrapper:
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
        elif shape in ("decode", "decode_packed"):
            library = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                float_workspace_buffer=scratch,
                kv_layout="HND",
                use_tensor_cores=shape == "decode_packed",
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
        tables, wrapper.step = self.tables(kind.page_size), self
        if not kind.num_kv_heads:
            plan_latent(wrapper, tables, kind, causal=not self.only_decode)
            return wrapper
        sizes = {"num_qo_heads": kind.num_heads, "num_kv_heads": kind.num_kv_heads, "page_size": kind.page_size}
        options = {
            "sm_scale": kind.scale,
            "window_left": kind.window - 1 if kind.window else -1,
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.dtype,
        }
        if self.only_decode:
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


def plan_latent(wrapper: Wrapper, tables: Tables, kind: Kind, *, causal: bool) -> None:
    """Plan latent attention over packed queries and pages."""
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
        causal=causal,
        sm_scale=kind.scale,
        q_data_type=kind.dtype,
        kv_data_type=kind.dtype,
    )
