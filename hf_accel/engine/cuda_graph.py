"""Replays decode steps from graphs, one for each batch size of a table; a batch is padded up to the next size.

Owns which sizes are captured, when, and when a graph is no longer the model's forward. How a step is computed is handed in, how
it is captured is `graph_capture`'s. Whatever cannot be captured runs eagerly, with one log line that says why.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_accel.attention.base import AttentionBackend, AttentionMetadata
from hf_accel.engine.decode_buffers import DecodeBuffers
from hf_accel.engine.forward_batch import ForwardBatch
from hf_accel.engine.graph_capture import GraphMaker, HostSyncWatch, StepGraph
from hf_accel.patching.forward_state import TensorAddresses

logger = logging.getLogger("hf_accel")

Compute = Callable[[ForwardBatch, AttentionMetadata], torch.Tensor]
"""The model's forward: logits [num_logits, vocab_size] of the model's dtype."""

PATIENCE = 3
"""Steps of a batch size that run otherwise before it gets a graph: a capture costs about three eager steps."""

MOST_PADDING = 2
"""A captured size may serve, until the right one is captured, batches of at least its so-and-so-much-th part."""


def batch_sizes(most: int) -> tuple[int, ...]:
    """The default table up to `most`: 1, 2, 4, 8, then steps of 8, of 16 above 256 and of 32 above 512; `most` itself."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, most + 32, 32)]
    return (*(n for n in sizes if n < most), most)


@dataclass(frozen=True)
class _Captured:
    graph: StepGraph
    batch: ForwardBatch  # its rows of the buffers
    metadata: AttentionMetadata


class CudaGraphRunner:
    """The graphs of one model on one device.

    Graphs are captured where steps first need them, not beforehand: `patch` stays instant, and sizes that a workload never
    has cost nothing. Whoever wants them all at once calls `warm_up`.

    Attributes:
        num_replays, num_captures: since the start.

    Args:
        buffers: hold the steps.
        backend: attends; supports graphs.
        maker: captures.
        sizes: ascending batch sizes.
        most_bytes: no further graph is captured once their memory has reached this.
        patience: steps of a batch size that run otherwise before it gets a graph.
    """

    def __init__(
        self,
        buffers: DecodeBuffers,
        backend: AttentionBackend,
        maker: GraphMaker,
        sizes: Sequence[int],
        most_bytes: int,
        patience: int,
    ) -> None:
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] <= buffers.max_batch
        self.buffers, self.sizes = buffers, tuple(sizes)
        self._backend, self._maker, self._most_bytes, self._patience = backend, maker, most_bytes, patience
        self._graphs: dict[int, _Captured] = {}
        self._logits: torch.Tensor | None = None  # [max_batch, vocab_size], where every graph leaves its result
        self._wanted: Counter[int] = Counter()
        self._state: Any = None
        self._addresses: TensorAddresses | None = None
        self._reason = "no call has begun"
        self._told: set[str] = set()
        self._full = self._checked = False
        self._graph_bytes = 0
        self.num_replays = self.num_captures = 0

    @property
    def num_graphs(self) -> int:
        """Graphs held now."""
        return len(self._graphs)

    @property
    def num_bytes(self) -> int:
        """Device bytes of the graphs, their result and their inputs."""
        return self._graph_bytes + (0 if self._logits is None else self._logits.nbytes) + self.buffers.num_bytes

    def follow(self, state: Any, addresses: Callable[[], TensorAddresses], reason: str) -> None:
        """Called between steps, when a call begins: graphs of another state are given up.

        Args:
            state: of everything that a graph bakes in, to be compared with `==`.
            addresses: takes note of where the model's tensors are.
            reason: why steps must run eagerly at present, or "".
        """
        if state != self._state:
            self.release()
            self._state, self._addresses = state, addresses()
        self._refuse(reason)

    def release(self) -> None:
        """Give up all graphs, and their memory."""
        if self._graphs:
            self._graphs.clear()
            self._maker.release()
        self._state = self._addresses = self._logits = None
        self._wanted.clear()
        self._full = self._checked = False
        self._graph_bytes = 0

    def run(self, batch: ForwardBatch, compute: Compute) -> torch.Tensor | None:
        """The logits of an uploaded batch, [num_seqs, vocab_size] float32, or None where it must run eagerly."""
        count = len(batch.seq_lens_cpu)
        if self._reason or batch.staged is None or count > self.sizes[-1]:
            return None
        if self._addresses is None or not self._addresses.hold():
            self.release()
            self._refuse("the weights moved while requests were running")
            return None
        if batch.input_ids.data_ptr() != self.buffers.input_ids.data_ptr():
            self.buffers.input_ids[:count].copy_(batch.input_ids)
        size = self._size_for(batch.seq_lens_cpu, compute)
        if size is None:
            return None
        self._replay(self._graphs[size], batch.seq_lens_cpu)
        assert self._logits is not None
        return self._logits[:count].to(torch.float32, copy=True)  # the next replay writes over them

    def warm_up(self, compute: Compute) -> None:
        """Capture every size, the largest first: the others then fit in its memory."""
        if self._reason:
            return
        self.buffers.stage((), (), (), ()).upload()
        for size in reversed(self.sizes):
            if size not in self._graphs and not self._capture(size, (), compute):
                return

    def _size_for(self, seq_lens: Sequence[int], compute: Compute) -> int | None:
        """A captured size for so many sequences; captures one when it is time."""
        count = len(seq_lens)
        size = self.sizes[bisect_left(self.sizes, count)]
        if size in self._graphs:
            return size
        self._wanted[size] += 1
        if self._wanted[size] > self._patience and self._capture(size, seq_lens, compute):
            return size
        larger = min((n for n in self._graphs if n > size), default=None)
        return larger if larger is not None and larger <= MOST_PADDING * count else None

    def _replay(self, captured: _Captured, seq_lens: Sequence[int]) -> None:
        padding = len(captured.batch.seq_lens_cpu) - len(seq_lens)
        batch = replace(captured.batch, seq_lens_cpu=(*seq_lens, *(1,) * padding))
        self._backend.refresh_graph(captured.metadata, batch)
        captured.graph.replay()
        self.num_replays += 1

    def _capture(self, size: int, seq_lens: Sequence[int], compute: Compute) -> bool:
        """Capture a size on the step that the buffers hold; says whether there is a graph now."""
        if self._full or self._reason:
            return False
        batch = self.buffers.rows((*seq_lens, *(1,) * (size - len(seq_lens))))
        metadata = self._backend.plan_graph(batch)
        warm = self._warm_up(lambda: compute(batch, metadata))
        if warm is None:
            return False
        try:
            if self._logits is None or self._logits.dtype != warm.dtype or self._logits.shape[1] != warm.shape[1]:
                self._logits = warm.new_empty(self.buffers.max_batch, warm.shape[1])
            logits = self._logits[:size]
            graph = self._maker.capture(lambda: logits.copy_(compute(batch, metadata)))
        except torch.OutOfMemoryError:
            self._stop("the device has no memory left for them")
            return False
        except Exception as error:
            self._give_up(f"the forward cannot be captured: {type(error).__name__}: {error}")
            return False
        self._graphs[size] = _Captured(graph, batch, metadata)
        self.num_captures += 1
        self._graph_bytes = self._maker.num_bytes
        if self._graph_bytes >= self._most_bytes:
            self._stop(f"they take {self._graph_bytes >> 20} MiB of the {self._most_bytes >> 20} MiB allowed")
        return True

    def _warm_up(self, step: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Run the step as the capture will; None if it fails so, or waits for the device."""
        watch = HostSyncWatch()

        def watched() -> torch.Tensor:
            with watch:
                return step()

        try:
            result = self._maker.warm_up(step)  # a backend may plan in it, on the host
            if not self._checked:
                self._maker.warm_up(watched)
        except torch.OutOfMemoryError:
            self._stop("the device has no memory left for them")
            return None
        except Exception as error:
            self._give_up(f"the forward fails before a capture: {type(error).__name__}: {error}")
            return None
        self._checked = True
        if watch.found:
            self._give_up(f"the model's forward makes the host wait for the device ({watch.found})")
            return None
        return result

    def _give_up(self, reason: str) -> None:
        """Until something changes that could make a difference, every step runs eagerly."""
        state, addresses = self._state, self._addresses
        self.release()
        self._state, self._addresses, self._full = state, addresses, True
        self._tell(logging.WARNING, f"hf_accel runs decode steps without CUDA graphs: {reason}")

    def _refuse(self, reason: str) -> None:
        """Run eagerly for a reason, or not any more ("")."""
        self._reason = reason
        if reason:
            self._tell(logging.INFO, f"hf_accel runs decode steps without CUDA graphs: {reason}")

    def _stop(self, reason: str) -> None:
        self._full = True
        held = ", ".join(map(str, sorted(self._graphs))) or "none"
        self._tell(logging.WARNING, f"hf_accel captures no more CUDA graphs: {reason} (batch sizes captured: {held})")

    def _tell(self, level: int, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.log(level, message)
