"""How long a call keeps the device busy, and how long a stretch of host code takes until the device is done.

On CUDA calls are captured into a graph over rotating sets of inputs, which hides the cost of launches and keeps the inputs
out of the L2 cache; what cannot be captured is timed call by call between events, after L2 was overwritten. On CPU it is a
clock around calls: for smoke runs only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
ROTATED_BYTES = 256 << 20
"""Several times the L2 cache of any chip (H100 and H200: 50 MB)."""
MAX_SETS = 128
GRAPH_MS = 4.0
"""A graph holds calls for about so long, so that starting it does not count."""

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a call, over so many rounds; `mode` is "graph", "events" or "wall"."""

    ms: float
    rounds: int
    mode: str


def num_sets(bytes_per_call: float, device: torch.device) -> int:
    """Sets of inputs to rotate over so that none is still in L2 when its turn comes; 2 on CPU."""
    if device.type != "cuda":
        return 2
    return max(1, min(MAX_SETS, round(ROTATED_BYTES / max(bytes_per_call, 1)) + 1))


def time_call(
    call: Call, sets: int, device: torch.device, *, seconds: float = 0.3, capture: bool = True, max_rounds: int = 50
) -> Timing:
    """Time `call(i)`, which works on set i; it was called before, so everything is compiled."""
    if device.type != "cuda":
        return _time_on_cpu(call, sets, seconds, max_rounds)
    if capture:
        try:
            return _time_graph(call, sets, seconds, max_rounds)
        except RuntimeError:  # in whatever words a library refuses to be captured
            torch.cuda.synchronize()  # raises if it was worse than that
    return _time_events(call, sets, seconds, max_rounds)


def _time_on_cpu(call: Call, sets: int, seconds: float, max_rounds: int) -> Timing:
    taken: list[float] = []
    stop = time.perf_counter() + seconds
    while not taken or (time.perf_counter() < stop and len(taken) < max_rounds):
        start = time.perf_counter()
        call(len(taken) % sets)
        taken.append(time.perf_counter() - start)
    return Timing(1000 * statistics.median(taken), len(taken), "wall")


def _time_events(call: Call, sets: int, seconds: float, max_rounds: int) -> Timing:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    taken: list[float] = []
    stop = time.perf_counter() + seconds
    while not taken or (time.perf_counter() < stop and len(taken) < max_rounds):
        flush.zero_()
        with _events() as elapsed:
            call(len(taken) % sets)
        taken.append(elapsed())
    return Timing(statistics.median(taken), len(taken), "events")


def _time_graph(call: Call, sets: int, seconds: float, max_rounds: int) -> Timing:
    with _events() as elapsed:
        for i in range(sets):
            call(i)
    passes = max(1, min(round(256 / sets), round(GRAPH_MS / max(elapsed(), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for i in range(sets):
                call(i)
    graph.replay()
    torch.cuda.synchronize()
    taken: list[float] = []
    stop = time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < stop and len(taken) < max_rounds):
        with _events() as elapsed:
            graph.replay()
        taken.append(elapsed() / (passes * sets))
    return Timing(statistics.median(taken), len(taken), "graph")


@contextmanager
def _events() -> Iterator[Callable[[], float]]:
    """Events around the block; what it gives waits for the device and returns milliseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()

    def elapsed() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    yield elapsed
    end.record()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def wall(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of host code until the device is done, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result
