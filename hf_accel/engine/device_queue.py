"""One device, one order: whatever is queued here runs after all that was queued before.

On this rests that pages and slots may have a new owner while a launched step still writes for the old one: the new owner's
work is queued behind it. Knows neither steps nor requests.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

from hf_accel.engine.idle_meter import HostSpan, IdleMeter, StreamSpan

T = TypeVar("T")


class Ticket(Protocol[T]):  # type: ignore[misc]
    """A job that was queued."""

    def wait(self) -> None:
        """Until the job is over, for better or worse."""
        ...

    def result(self) -> T:
        """What it returned; raises what it raised. Waits if need be."""
        ...


class DeviceQueue(Protocol):
    """Where a device's work goes."""

    meter: IdleMeter

    def submit(self, job: Callable[[], T]) -> Ticket[T]:
        """Queue a job and do not wait for it; after one that failed none runs until `synchronize`."""
        ...

    def run(self, job: Callable[[], T]) -> T:
        """Do a job in this thread, after all that was queued; `meter` takes its time for a step's."""
        ...

    def synchronize(self) -> None:
        """Wait until nothing that was queued can still be running on this side."""
        ...

    @property
    def runs_here(self) -> bool:
        """Whether the calling thread is the device's own."""
        ...

    def close(self) -> None:
        """Stop; nothing may be queued any more."""
        ...


class WorkerQueue:
    """A thread plays the device: for CPU. It starts with the first `submit` and ends with the queue."""

    def __init__(self) -> None:
        self.meter = IdleMeter()
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], T]) -> Ticket[T]:
        """See `DeviceQueue`."""
        ticket = _Job(job, self.meter)
        self._put(ticket)
        return ticket

    def run(self, job: Callable[[], T]) -> T:
        """See `DeviceQueue`."""
        self.synchronize()
        span = HostSpan()
        try:
            return job()
        finally:
            span.close()
            self.meter.add(span)

    def synchronize(self) -> None:
        """See `DeviceQueue`."""
        if self._thread is not None and self._thread.is_alive() and not self.runs_here:
            mark = _Job(lambda: None, None)
            self._put(mark)
            mark.wait()

    @property
    def runs_here(self) -> bool:
        """See `DeviceQueue`."""
        return self._thread is threading.current_thread()

    def close(self) -> None:
        """See `DeviceQueue`."""
        thread, self._thread = self._thread, None
        self._jobs.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _put(self, job: _Job[Any]) -> None:
        if self._thread is None or not self._thread.is_alive():  # it is dead in a forked child
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_work, args=(self._jobs,), name="hf_accel device", daemon=True
            )  # knows the jobs alone: an engine that nobody holds goes, and its thread with it
            _running[self._thread] = self._jobs
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        self._jobs.put(job)


class _Job(Generic[T]):
    """A job of a WorkerQueue and its ticket. Without a meter it is a mark: it runs after a failure too, and ends it."""

    def __init__(self, job: Callable[[], T], meter: IdleMeter | None) -> None:
        self._job: Callable[[], T] | None = job
        self._meter = meter
        self._done = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    def wait(self) -> None:
        """See `Ticket`."""
        self._done.wait()

    def result(self) -> T:
        """See `Ticket`."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def execute(self, after_failure: bool) -> bool:
        """Run in the device's thread; says whether the jobs after it must not run."""
        span = HostSpan()
        try:
            if after_failure and self._meter is not None:
                raise RuntimeError("a step that was launched before failed")
            assert self._job is not None
            self._value = self._job()
        except BaseException as error:
            self._error = error
        finally:
            self._job = None  # it holds the engine
            if self._meter is not None:
                span.close()
                self._meter.add(span)
            self._done.set()
        return self._error is not None


_running: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[_Job[Any] | None]] = weakref.WeakKeyDictionary()


@atexit.register
def _stop_all() -> None:
    """A thread that is inside torch when the interpreter ends would take the process down: let each end its job."""
    for thread, jobs in list(_running.items()):
        jobs.put(None)
        if thread.is_alive():
            thread.join()


def _work(jobs: queue.SimpleQueue[_Job[Any] | None]) -> None:
    failed = False
    while (job := jobs.get()) is not None:
        failed = job.execute(failed)
        del job


class StreamQueue:
    """A CUDA stream: the caller's current one. Python code runs at once, what it launches runs in the stream's order."""

    def __init__(self, device: torch.device) -> None:
        self.meter = IdleMeter()
        self._device = device
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def submit(self, job: Callable[[], T]) -> Ticket[T]:
        """See `DeviceQueue`; raises at once what the launching code raises."""
        value, span = self._launch(job)
        return _Launched(value, span)

    def run(self, job: Callable[[], T]) -> T:
        """See `DeviceQueue`."""
        return self._launch(job)[0]

    def _launch(self, job: Callable[[], T]) -> tuple[T, StreamSpan]:
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last[0] != stream:  # another caller's: one order for all
            stream.wait_event(self._last[1])
        span = StreamSpan(stream)
        try:
            return job(), span
        finally:
            span.close()
            self._last = (stream, span.end)
            self.meter.add(span)

    def synchronize(self) -> None:
        """See `DeviceQueue`: the stream's order is enough."""

    @property
    def runs_here(self) -> bool:
        """See `DeviceQueue`."""
        return False

    def close(self) -> None:
        """See `DeviceQueue`."""


class _Launched(Generic[T]):
    """Work that is on a stream."""

    def __init__(self, value: T, span: StreamSpan) -> None:
        self._value, self._span = value, span
        self._error: Exception | None = None

    def wait(self) -> None:
        """See `Ticket`."""
        try:
            self._span.end.synchronize()
        except Exception as error:  # a kernel failed
            self._error = error

    def result(self) -> T:
        """See `Ticket`."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value
