"""An engine in a steady state: a batch of rows that decode, timed over a stretch of steps.

The only place of the suite that looks behind `Engine`'s public calls: tokens of requests that still run,
and the count of the device's idle time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hf_accel
from benchmarks.gpu.context import known_options
from benchmarks.gpu.timing import wall


@dataclass(frozen=True)
class Stretch:
    """A run of decode steps: milliseconds a step, the device's idle share if the engine tells it, and how many steps."""

    ms: float
    idle_share: float | None
    num_steps: int


def new_tokens(engine: Any, request_id: int) -> list[int]:
    """Tokens that a request has generated so far, as its caller would see them."""
    return engine._group(request_id).output.outputs[0].token_ids


class Rows:
    """`len(prompts)` requests of one engine that decode together.

    Args:
        engine: idle; its cache is not used, so prompts should differ.
        prompts: token ids, of equal length.
        max_tokens: more than all stretches take.
    """

    def __init__(self, engine: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self.engine, self.num_rows = engine, len(prompts)
        params = hf_accel.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.ids = [engine.add_request(list(prompt), params) for prompt in prompts]
        self.room = max_tokens

    def prefill(self, device: torch.device) -> float:
        """Step until every row has a token; seconds."""
        seconds, _ = wall(self._prefill, device)
        return seconds

    def _prefill(self) -> None:
        while not all(new_tokens(self.engine, i) for i in self.ids):
            self.engine.step()

    def decode(self, num_steps: int, device: torch.device) -> Stretch:
        """Time so many steps.

        Raises:
            RuntimeError: rows ended or were sent back within the stretch, so that it was not steady.
        """
        before = [len(new_tokens(self.engine, i)) for i in self.ids]
        if max(before) + num_steps + 2 > self.room:
            raise RuntimeError(f"{num_steps} steps do not fit in {self.room} tokens a row")
        counted = device_seconds(self.engine)

        def steps() -> None:
            for _ in range(num_steps):
                self.engine.step()

        seconds, _ = wall(steps, device)
        made = sum(len(new_tokens(self.engine, i)) - n for i, n in zip(self.ids, before, strict=True))
        if abs(made - num_steps * self.num_rows) > self.num_rows:  # results may come one step late
            raise RuntimeError(f"{num_steps} steps of {self.num_rows} rows gave {made} tokens: not steady")
        return Stretch(1000 * seconds / num_steps, idle_share(self.engine, counted), num_steps)

    def close(self) -> None:
        """Abort the rows and drop their pages."""
        for request_id in self.ids:
            self.engine.abort(request_id)
        while self.engine.has_unfinished_requests:
            self.engine.step()
        self.engine.flush_cache()


def device_seconds(engine: Any) -> tuple[float, float] | None:
    """(busy, idle) seconds that the engine has counted so far; None where it counts none."""
    meter = getattr(getattr(engine.core.executor, "queue", None), "meter", None)
    return None if meter is None else meter.seconds


def idle_share(engine: Any, before: tuple[float, float] | None) -> float | None:
    """The device's idle share since `before`; that of the engine's whole life where only its stats tell it; else None."""
    now = device_seconds(engine)
    if now is None or before is None:
        return getattr(engine.stats(), "device_idle_share", None)
    busy, idle = now[0] - before[0], now[1] - before[1]
    return idle / (busy + idle) if busy + idle > 0 else None


def make_engine(model: Any, **options: Any) -> Any:
    """An engine with those of the options that this checkout has."""
    return hf_accel.Engine(model, **known_options(**options))
