"""How a step becomes a graph: CUDA's own, or on CPU the step itself run again on the same buffers.

Owns every call of `torch.cuda.graph`, the memory pool that graphs share, and the watch for what cannot be captured. Knows no
batch and no model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class StepGraph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Run it on what its buffers hold now; does not wait."""
        ...


class GraphMaker(Protocol):
    """Makes graphs of one device that share their memory: no two run at the same time."""

    @property
    def num_bytes(self) -> int:
        """Device bytes of the graphs' shared memory."""
        ...

    def warm_up(self, step: Callable[[], T]) -> T:
        """Run a step as it will be captured, so that everything it makes at its first run is made."""
        ...

    def capture(self, step: Callable[[], object]) -> StepGraph:
        """Capture a step, which does not run. Raises whatever it or the capture raises."""
        ...

    def release(self) -> None:
        """Give the memory back; nobody replays the graphs any more."""
        ...


class RerunMaker:
    """For CPU: a replay calls the step again, whose host values are those of the capture. Holds no memory."""

    num_bytes = 0

    def warm_up(self, step: Callable[[], T]) -> T:
        """See `GraphMaker`."""
        return step()

    def capture(self, step: Callable[[], object]) -> StepGraph:
        """See `GraphMaker`."""
        return _Rerun(step)

    def release(self) -> None:
        """See `GraphMaker`."""


class _Rerun:
    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step

    def replay(self) -> None:
        self._step()


class CudaGraphMaker:
    """CUDA graphs of one device, captured on a stream of their own; replays run on the caller's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    @property
    def num_bytes(self) -> int:
        """See `GraphMaker`."""
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) == tuple(self._pool))

    def warm_up(self, step: Callable[[], T]) -> T:
        """See `GraphMaker`."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    return step()
            finally:
                current.wait_stream(self._stream)

    def capture(self, step: Callable[[], object]) -> StepGraph:
        """See `GraphMaker`."""
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate, copy and train meanwhile: only this thread's calls can spoil the capture.
            options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with _repaired_after_failure(self._device, self._pool), torch.cuda.graph(graph, **options):
                step()
            return graph

    def release(self) -> None:
        """See `GraphMaker`."""
        torch.cuda.synchronize(self._device)  # a graph may still be running
        self._pool = None
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _repaired_after_failure(device: torch.device, pool: Any) -> Iterator[None]:
    """A capture that the driver declares invalid ends before torch hears of it: its allocator would go on filling the pool, its
    random numbers would refuse to be drawn."""
    try:
        yield
    except BaseException:
        index = torch.cuda.current_device() if device.index is None else device.index
        with contextlib.suppress(Exception):  # it had heard
            torch._C._cuda_endAllocateToPool(index, pool)
        with contextlib.suppress(Exception):
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())  # a copy is not in a capture
        raise


# -- what cannot be captured --

_WAITING_OPS = frozenset(
    {
        "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
        "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    }
)  # fmt: skip
_INDEXING_OPS = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
_COPYING_OPS = frozenset({"aten::_to_copy", "aten::copy_", "aten::copy"})


class HostSyncWatch(TorchDispatchMode):
    """While open, in this thread, notes the first operation whose result or size the host must wait for, or that copies
    between host and device: a capture with it would fail, and leave torch's random numbers and allocator in disorder.

    It sees torch's operations only, not those of kernels launched by other means.

    Attributes:
        found: its name, or "".
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.found and _waits(func, args, kwargs or {}, result):
            self.found = str(func._schema.name)
        return result


def _waits(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> bool:
    name = func._schema.name
    if name in _WAITING_OPS:
        return True
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name in _INDEXING_OPS:
        indices = args[1]
        return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
    if name in _COPYING_OPS and isinstance(result, torch.Tensor):
        sources = [a for a in args if isinstance(a, torch.Tensor)]
        return any(a.device != result.device for a in sources)
    return False
