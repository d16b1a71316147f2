"""The running batch: one scheduler, one runner, many calling threads.

There is no engine thread. Whoever waits for a request drives: one thread at a time runs steps for everybody, the others
sleep until something of theirs has changed. So an exception, a KeyboardInterrupt or a dead thread leaves nothing behind.
Two kinds of request share the batch: those that the engine samples, and rows whose caller samples (`external_sampling`):
these get their logits handed out by `next_logits` and their token back through `feed`. Two loops stand side by side: the
overlapped one (`overlap`) where `EngineConfig.overlap` allows it and no request needs the host between two steps, and the
plain one (`plain_loop`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from hf_accel.config import EngineConfig
from hf_accel.engine.executor import Executor
from hf_accel.engine.interrupts import interrupts_deferred
from hf_accel.engine.overlap import OverlappedLoop
from hf_accel.engine.plain_loop import PlainLoop, TokensCallback
from hf_accel.kv_cache.manager import KVCacheManager
from hf_accel.request import Request, RequestStatus
from hf_accel.scheduler.scheduler import Scheduler

MAX_REGROUP_SECONDS = 0.005
"""A step waits at most so long for callers that are sampling their rows, so that their rows step together."""


class EngineCore:
    """Thread-safe continuous batching over one model.

    Args:
        executor: runs steps on the device.
        config: limits and policy.
        on_tokens: called under the lock after each step, with each request of it, also with those that failed.
        ids: where request ids come from.
    """

    def __init__(
        self, executor: Executor, config: EngineConfig, on_tokens: TokensCallback, ids: Iterator[int] | None = None
    ) -> None:
        self.config = config
        self.executor = executor
        faults = config.faults
        self.cache = KVCacheManager(executor.num_pages, config.page_size, config.enable_prefix_cache, faults.force_miss)
        self.scheduler = Scheduler(config, self.cache)
        self.requests: dict[int, Request] = {}
        self.busy_seconds = 0.0
        self._ids = itertools.count() if ids is None else ids
        self._lock = (
            threading.RLock()
        )  # entered itself: Ctrl-C may fall inside a Condition's own __enter__, not in a lock's
        self._condition = threading.Condition(self._lock)
        self._stepper: int | None = None  # the thread that runs a step now
        self._num_visitors = 0  # threads that wait for the gap between two steps
        self._num_drivers = 0  # threads inside `drive` or `driving`
        self._held_logits: dict[int, torch.Tensor] = {}
        self._num_sampling = 0
        self._last_step_end = 0.0
        self._last_step_seconds = 0.0
        parts = (executor, self.scheduler, self.requests, self._held_logits, on_tokens, self._lock)
        self._plain, self._overlapped = PlainLoop(*parts), OverlappedLoop(*parts)

    # ---- requests ----------------------------------------------------------------------------------------------

    def add(self, make_request: Callable[[int], Request]) -> Request:
        """Queue the request that `make_request(request_id)` builds."""
        with interrupts_deferred(), self._lock:
            request = make_request(next(self._ids))
            if self.scheduler.is_empty:
                self.executor.queue.meter.pause()  # up to now the device had nothing to do
            self.requests[request.request_id] = request
            self.scheduler.add(request)
            return request

    def release(self, requests: Sequence[Request]) -> None:
        """Forget requests; those still going are aborted and give their pages back."""
        with interrupts_deferred(), self._lock:
            for request in requests:
                self.scheduler.finish(request, RequestStatus.ABORTED, "abort")
                self.requests.pop(request.request_id, None)
                self._held_logits.pop(request.request_id, None)
            self._condition.notify_all()

    def finish(self, request: Request, status: RequestStatus, reason: str, error: BaseException | None = None) -> None:
        """End a request early (a stop string, an abort, a failure of its own); ended ones are left as they are."""
        with interrupts_deferred(), self._lock:
            self.scheduler.finish(request, status, reason, error)
            self._condition.notify_all()

    # ---- driving -----------------------------------------------------------------------------------------------

    def drive(self, done: Callable[[], bool]) -> None:
        """Run steps, or let another thread run them, until `done()` (called under the lock) says so.

        The last thread to leave leaves no step in flight: see `driving`.
        """
        with self._lock:
            self._refuse_own_step()
            self._num_drivers += 1
            try:
                while not done():
                    if self._stepper is not None or self._num_visitors:
                        self._condition.wait()
                    elif (wait := self._regroup_seconds()) > 0:
                        self._condition.wait(wait)
                    elif not self._has_work:
                        self._condition.wait(0.1)
                    else:
                        self._step()
            finally:
                self._leave()

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Around `drive` calls of one thread that follow each other closely: between them a step stays in flight."""
        with self._lock:
            self._num_drivers += 1
        try:
            yield
        finally:
            with interrupts_deferred(), self._lock:
                self._leave()

    def _leave(self) -> None:
        self._num_drivers -= 1
        others = self._num_drivers or self._num_visitors or self._stepper is not None
        if self._overlapped.in_flight and not others:
            self._drain()

    def step(self) -> bool:
        """Run one step if there is work and nobody else is stepping; says whether it ran. It may leave one in flight."""
        with self._lock:
            self._refuse_own_step()
            if self._stepper is not None or self._num_visitors or not self._has_work:
                return False
            self._step()
            return True

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the engine between steps, with none in flight, for what must not happen during one."""
        with interrupts_deferred(), self._lock:
            self._refuse_own_step()
            self._num_visitors += 1  # whoever drives lets visitors in before its next step
            try:
                while self._stepper is not None or self._overlapped.in_flight:
                    if self._stepper is not None:
                        self._condition.wait()
                    else:
                        self._drain()
                yield
            finally:
                self._num_visitors -= 1
                self._condition.notify_all()

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Guards every request and the scheduler."""
        return self._lock

    # ---- rows sampled by their caller --------------------------------------------------------------------------

    @contextmanager
    def next_logits(self, rows: Sequence[Request]) -> Iterator[list[torch.Tensor]]:
        """Logits ([vocab_size] float32 each) that follow each row's last token; sample and `feed` inside the block.

        Raises:
            The row's own error if one of them failed.
        """
        self.drive(lambda: all(row.awaiting_token or row.status.ended for row in rows))
        sampling = False
        try:
            with self._lock:
                for row in rows:
                    if row.error is not None:
                        raise row.error
                if any(row.status.ended for row in rows):
                    raise RuntimeError("the request was aborted by another thread")
                logits = [self._held_logits[row.request_id] for row in rows]
                self._num_sampling += 1
                sampling = True
            yield logits
        finally:
            with interrupts_deferred(), self._lock:
                self._num_sampling -= sampling
                self._condition.notify_all()

    def feed(self, rows: Sequence[Request], token_ids: Sequence[int]) -> None:
        """Give each row the token that its caller chose."""
        with interrupts_deferred(), self._lock:
            for row, token_id in zip(rows, token_ids, strict=True):
                self._held_logits.pop(row.request_id, None)
                self.scheduler.append_token(row, token_id)

    # ---- one step ----------------------------------------------------------------------------------------------

    def _refuse_own_step(self) -> None:
        if self._stepper == threading.get_ident() or self.executor.queue.runs_here:
            raise RuntimeError(
                "the engine was called from inside a step of its own (a forward hook, or a logits processor of "
                "SamplingParams): call it before or after"
            )

    @property
    def _has_work(self) -> bool:
        return self._overlapped.in_flight or self.scheduler.has_work

    def _regroup_seconds(self) -> float:
        if not self._num_sampling:
            return 0.0
        window = min(MAX_REGROUP_SECONDS, self._last_step_seconds)
        return self._last_step_end + window - time.monotonic()

    def _step(self) -> None:
        """One step, begun and ended under the lock, the device's part outside of it."""
        start = time.monotonic()
        with interrupts_deferred() as gate:
            self._stepper = threading.get_ident()
            try:
                if self._overlapped.may_launch:
                    self._overlapped.step(gate)
                elif self._overlapped.in_flight:
                    self._overlapped.drain(gate)
                else:
                    self._plain.step(gate)
                    self._overlapped.trust_again()
            finally:
                self._stepper = None
                self._last_step_end = time.monotonic()
                self._last_step_seconds = self._last_step_end - start
                self.busy_seconds += self._last_step_seconds
                self._condition.notify_all()
        if self.config.faults.check_integrity:
            self.scheduler.check_integrity()

    def _drain(self) -> None:
        """Take in what is in flight. Nobody is stepping."""
        start = time.monotonic()
        with interrupts_deferred():
            self._stepper = threading.get_ident()
            try:
                self._overlapped.drain()
            finally:
                self._stepper = None
                self.busy_seconds += time.monotonic() - start
                self._condition.notify_all()
        if self.config.faults.check_integrity:
            self.scheduler.check_integrity()
