"""Puts something in the way of an engine's forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from hf_accel import Engine
from hf_accel.engine.forward_batch import ForwardBatch

DEVICE_THREAD = "hf_accel device"


def device_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == DEVICE_THREAD]


def wrap_forward(engine: Engine, around: Callable[[ForwardBatch, Callable[[], torch.Tensor]], torch.Tensor]) -> None:
    """`around(batch, forward)` takes the place of each forward of the engine."""
    runner: Any = engine.core.executor.runner
    forward = runner.forward
    runner.forward = lambda batch: around(batch, lambda: forward(batch))


class Forwards:
    """Records each forward: its size, and whether the device thread ran it. Holds those back that have no leave."""

    def __init__(self, engine: Engine, *, held: bool = False) -> None:
        self.sizes: list[int] = []
        self.ahead: list[bool] = []
        self.unknown: list[bool] = []
        self._held, self._leaves = held, threading.Semaphore(0)
        wrap_forward(engine, self._around)

    def _around(self, batch: ForwardBatch, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.sizes.append(len(batch.query_lens_cpu))
        self.ahead.append(threading.current_thread().name == DEVICE_THREAD)
        self.unknown.append(batch.has_unknown)
        if self._held:
            assert self._leaves.acquire(timeout=60), "nobody let the device go on"
        return forward()

    def let_go(self, count: int = 1) -> None:
        self._leaves.release(count)
