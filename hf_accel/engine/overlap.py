"""The overlapped loop: while the device runs step N the host plans and launches N + 1, and learns N's tokens only then.

N + 1 reads them from the device's token table, so nothing waits for the host. One step late the host finds out who ended:
that row's place in N + 1 computes a token that nobody sees. Its page and slot may have a new owner by then, whose work is
queued behind N + 1. Whatever goes wrong takes the launched steps back; the plain loop runs their requests again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

from hf_accel.engine.executor import PendingStep
from hf_accel.engine.interrupts import InterruptGate
from hf_accel.engine.plain_loop import StepLoop
from hf_accel.request import Request
from hf_accel.scheduler.output import SchedulerOutput


@dataclass(frozen=True)
class _InFlight:
    output: SchedulerOutput
    requests: list[Request]
    pending: PendingStep


class OverlappedLoop(StepLoop):
    """Between two calls of `step` one launched step may be in flight. Arguments as `StepLoop`'s."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._in_flight: deque[_InFlight] = deque()
        self._failed = False

    @property
    def in_flight(self) -> bool:
        """Whether a launched step's result was not taken in yet."""
        return bool(self._in_flight)

    @property
    def may_launch(self) -> bool:
        """Whether the next step may be launched ahead: not after a failure, and not if it needs the host."""
        return self.executor.overlaps and not self._failed and self.scheduler.may_run_ahead

    def trust_again(self) -> None:
        """The plain loop has run a step since the last failure."""
        self._failed = False

    def step(self, gate: InterruptGate) -> None:
        """Plan and launch a step, then take in the result of the one before it."""
        launched = self.scheduler.has_work and self._launch(gate)
        if len(self._in_flight) > launched:
            self._collect(gate)
        if self.scheduler.is_empty:
            self.drain()  # what is left computes for nobody

    def drain(self, gate: InterruptGate | None = None) -> None:
        """Take in all results; open to interrupts with a gate."""
        while self._in_flight:
            self._collect(gate)

    def _launch(self, gate: InterruptGate) -> bool:
        output = self._plan()
        if not output.requests:
            return False
        requests = self._requests_of(output)
        try:
            batch = self.executor.build(output)
            with self._unlocked(), gate.open():
                pending = self.executor.launch(batch, requests)
        except BaseException as error:
            # Half of it may be queued, and may have overwritten the token table: the step before must be over first.
            self._failed = True
            self.executor.queue.synchronize()
            self.scheduler.resend_pages(requests)
            if not isinstance(error, Exception):
                raise
            return False
        self.scheduler.launched(output)
        self._in_flight.append(_InFlight(output, requests, pending))
        return True

    def _collect(self, gate: InterruptGate | None) -> None:
        step = self._in_flight[0]
        with self._unlocked(), contextlib.nullcontext() if gate is None else gate.open():
            step.pending.wait()  # interrupted, it stays in flight for whoever drives next
        try:
            result = step.pending.result()
        except BaseException as error:
            self._roll_back()
            if not isinstance(error, Exception):
                raise
            return
        self._in_flight.popleft()
        self._apply(step.output, step.requests, result)

    def _roll_back(self) -> None:
        """The oldest step failed, and those behind it are junk."""
        for step in self._in_flight:
            step.pending.wait()
        self._in_flight.clear()
        self._failed = True
        self.executor.queue.synchronize()
        self.scheduler.roll_back()
