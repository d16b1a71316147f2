"""The plain loop: a step is planned, run and over before the next is planned. Also what both loops share.

Everything here is called under the engine's lock, which is let go while the device works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from hf_accel.engine.executor import Executor, StepResult
from hf_accel.engine.interrupts import InterruptGate
from hf_accel.request import Request, RequestStatus
from hf_accel.scheduler.output import SchedulerOutput
from hf_accel.scheduler.scheduler import Scheduler

TokensCallback = Callable[[Request, StepResult], None]


class StepLoop:
    """What a loop does before and after the device's part of a step.

    Args:
        executor: runs steps on the device.
        scheduler: plans them.
        requests: all requests by id.
        held_logits: where the logits of rows that their caller samples go.
        on_tokens: called after each step, with each request of it, also with those that failed.
        lock: the engine's, held by whoever calls.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        requests: dict[int, Request],
        held_logits: dict[int, torch.Tensor],
        on_tokens: TokensCallback,
        lock: threading.RLock,  # type: ignore[valid-type]
    ) -> None:
        self.executor, self.scheduler = executor, scheduler
        self._requests, self._held_logits, self._on_tokens, self._lock = requests, held_logits, on_tokens, lock

    def _plan(self) -> SchedulerOutput:
        """Schedule, and make the copies that the step's admissions count on: once, however often the step is run."""
        output = self.scheduler.schedule()
        try:
            if output.page_copies:
                self.executor.copy_pages(output.page_copies)
        except BaseException:
            self.scheduler.retract_all()
            raise
        finally:
            for request_id in output.failed:
                self._tell(self._requests[request_id], StepResult())
        return output

    def _requests_of(self, output: SchedulerOutput) -> list[Request]:
        return [self._requests[item.request_id] for item in output.requests]

    def _apply(self, output: SchedulerOutput, requests: Sequence[Request], result: StepResult) -> None:
        going = [r for r in requests if not r.status.ended]  # others were ended meanwhile: their tokens are nobody's
        for request in going:
            if request.request_id in result.errors:
                self.scheduler.finish(request, RequestStatus.FAILED, "error", result.errors[request.request_id])
        taken = self.scheduler.update(output, {i: [t.token_id for t in own] for i, own in result.tokens.items()})
        for request_id, num_taken in taken.items():
            del result.tokens[request_id][num_taken:]
        for request in going:
            if request.awaiting_token:
                self._held_logits[request.request_id] = result.last_logits[request.request_id]
            self._tell(request, result)

    def _tell(self, request: Request, result: StepResult) -> None:
        """Hand a request its step's result; what goes wrong there is that request's failure alone."""
        try:
            self._on_tokens(request, result)
        except Exception as error:
            self.scheduler.finish(request, RequestStatus.FAILED, "error", error)
            request.error = request.error or error
            self._on_tokens(request, StepResult())

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._lock.release()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._lock.acquire()  # type: ignore[attr-defined]


class PlainLoop(StepLoop):
    """One step at a time. It finds the guilty request of a step that fails."""

    def step(self, gate: InterruptGate) -> None:
        """One step, its forward outside of the lock and open to interrupts."""
        output = self._plan()
        if output.requests:
            self._run(output, gate)

    def _run(self, output: SchedulerOutput, gate: InterruptGate) -> None:
        requests = self._requests_of(output)
        try:
            batch = self.executor.build(output)
            with self._unlocked(), gate.open():
                result = self.executor.execute(batch, requests)
        except Exception as error:
            self.scheduler.resend_pages(requests)
            if len(requests) == 1:
                self._fail(requests[0], error)
            else:
                self._run_alone(output, requests, gate)
            return
        except BaseException:  # KeyboardInterrupt: nothing was counted, so the next driver runs the same tokens again
            self.scheduler.resend_pages(requests)
            raise
        self._apply(output, requests, result)

    def _fail(self, request: Request, error: Exception) -> None:
        if not request.status.ended:
            self.scheduler.finish(request, RequestStatus.FAILED, "error", error)
            self._tell(request, StepResult())

    def _run_alone(self, output: SchedulerOutput, requests: list[Request], gate: InterruptGate) -> None:
        """A batch failed: run its requests one by one, so that only the guilty one fails."""
        for item, request in zip(output.requests, requests, strict=True):
            if request.status is RequestStatus.RUNNING:
                whole_row = tuple(enumerate(self.scheduler.cache.page_ids(item.request_id)))
                self._run(SchedulerOutput((replace(item, page_updates=whole_row),), len(item.token_ids)), gate)
