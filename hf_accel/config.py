"""Configuration of an engine: frozen, resolved once, never written back to. Knows neither torch nor transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

POLICIES = ("fcfs", "lpm", "priority")
ATTENTION_BACKENDS = ("auto", "cpu", "torch", "triton", "flashinfer")
KV_CACHE_DTYPES = ("auto", "fp8")


@dataclass(frozen=True)
class FaultInjection:
    """Switches that force rare paths, for tests: the outputs must not change.

    Attributes:
        retract_every: retract one running request every so many steps (0: never; 2 or more with `overlap`).
        force_miss: treat every prefix lookup as a miss.
        check_integrity: verify every invariant of the pool and the prefix tree after each step.
        device_forward: on CPU too, run plain dense Llama-like models through the loop over layers meant for devices.
    """

    retract_every: int = 0
    force_miss: bool = False
    check_integrity: bool = False
    device_forward: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model.

    Attributes:
        page_size: tokens in one page of the KV cache.
        num_pages: pages in the pool; None sizes the pool from `memory_fraction` of the device's free memory.
        memory_fraction: share of the device's free memory that the pool may take when `num_pages` is None.
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: token budget of one step (decode tokens and prefill chunks together).
        max_prefill_chunk: most tokens of one request in one step; None means the whole step budget.
        policy: order of the waiting queue: "fcfs", "lpm" (longest prefix match first) or "priority".
        enable_prefix_cache: share KV between requests with a common prefix.
        attention_backend: "auto", "cpu" (the C++ op), "triton" or "flashinfer" (CUDA), or "torch".
        kv_cache_dtype: "auto" (the model's own) or "fp8" (e4m3 with scales for each token; MLA models only, approximate).
        fused: run plain dense Llama-like models through the fused CPU decoder where it applies; on CUDA through our own loop
            over their layers, for which the q, k, v and gate, up weights of a layer move into one tensor until the engine closes.
        pack_weights: keep a second, pre-packed copy of plain dense weights for fast CPU matrix products:
            True, False, or "auto" (where memory allows).
        overlap: plan and launch the next step while the device runs the last one: True, False, or "auto" (on CUDA).
        cuda_graphs: replay decode steps from CUDA graphs: True, False, or "auto" (on CUDA, where the attention backend can be
            captured). They are captured when steps first need them; `Engine.warmup` captures all. True on CPU, for tests,
            runs the same logic with a stand-in that computes each step again.
        cuda_graph_batch_sizes: batch sizes that get a graph, ascending, or None: 1, 2, 4, 8, 16, 24 ... `max_num_seqs`. A
            larger batch runs without.
        cuda_graph_memory_fraction: no further graph is captured once they take this share of the device's memory.
        faults: forced faults, for tests.

    Raises:
        ValueError: for a value out of range; the message says which values are allowed.
    """

    page_size: int = 16
    num_pages: int | None = None
    memory_fraction: float = 0.5
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_prefill_chunk: int | None = None
    policy: str = "lpm"
    enable_prefix_cache: bool = True
    attention_backend: str = "auto"
    kv_cache_dtype: str = "auto"
    fused: bool = True
    pack_weights: bool | str = "auto"
    overlap: bool | str = "auto"
    cuda_graphs: bool | str = "auto"
    cuda_graph_batch_sizes: tuple[int, ...] | None = None
    cuda_graph_memory_fraction: float = 0.1
    faults: FaultInjection = field(default_factory=FaultInjection)

    def __post_init__(self) -> None:
        for name in ("page_size", "max_num_seqs", "max_num_batched_tokens", "num_pages", "max_prefill_chunk"):
            value = getattr(self, name)
            if value is None and name in ("num_pages", "max_prefill_chunk"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("memory_fraction", "cuda_graph_memory_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.attention_backend not in ATTENTION_BACKENDS:
            raise ValueError(
                f"attention_backend must be one of {', '.join(ATTENTION_BACKENDS)}, got {self.attention_backend!r}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}")
        if self.pack_weights not in (True, False, "auto"):
            raise ValueError(f"pack_weights must be True, False or 'auto', got {self.pack_weights!r}")
        if self.overlap not in (True, False, "auto"):
            raise ValueError(f"overlap must be True, False or 'auto', got {self.overlap!r}")
        if self.cuda_graphs not in (True, False, "auto"):
            raise ValueError(f"cuda_graphs must be True, False or 'auto', got {self.cuda_graphs!r}")
        sizes = self.cuda_graph_batch_sizes
        if sizes is not None and (
            not isinstance(sizes, tuple)
            or not sizes
            or not all(type(n) is int and n > 0 for n in sizes)
            or list(sizes) != sorted(set(sizes))
        ):
            raise ValueError(f"cuda_graph_batch_sizes must be a tuple of ascending positive integers, got {sizes!r}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Build a config from keyword arguments; an unknown one raises a ValueError that lists the known ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ValueError(f"unknown engine option(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**kwargs)
