"""How much of the time a device had nothing to run: from the spans of the steps, in the device's own time."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Protocol

import torch


class Span(Protocol):
    """The time from the beginning to the end of one step on the device."""

    @property
    def done(self) -> bool:
        """Whether its end has come; the other methods need it."""
        ...

    def seconds(self) -> float:
        """Its length."""
        ...

    def seconds_after(self, earlier: Any) -> float:
        """From the end of an earlier span of the same kind to its beginning."""
        ...


class HostSpan:
    """A step that a thread of the host computes. Begins when it is made."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._end: float | None = None

    def close(self) -> None:
        """The step ends now."""
        self._end = time.monotonic()

    @property
    def done(self) -> bool:
        """See `Span`."""
        return self._end is not None

    def seconds(self) -> float:
        """See `Span`."""
        assert self._end is not None
        return self._end - self._start

    def seconds_after(self, earlier: HostSpan) -> float:
        """See `Span`."""
        assert earlier._end is not None
        return self._start - earlier._end


class StreamSpan:
    """A step on a CUDA stream, from the first of its kernels to the last. Begins with what is queued next."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._start.record(stream)

    def close(self) -> None:
        """The step ends with what is queued now."""
        self.end.record(self._stream)

    @property
    def done(self) -> bool:
        """See `Span`."""
        return self.end.query()

    def seconds(self) -> float:
        """See `Span`."""
        return self._start.elapsed_time(self.end) / 1000

    def seconds_after(self, earlier: StreamSpan) -> float:
        """See `Span`."""
        return earlier.end.elapsed_time(self._start) / 1000


_MANY = 64  # spans that are kept until somebody looks at them: CUDA has so many events at hand


class IdleMeter:
    """Sums the spans and the gaps between them. A gap across `pause` is nobody's fault and does not count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the sums; the device's thread appends, any thread asks
        self._waiting: deque[Span | None] = deque()  # None: a pause
        self._last: Span | None = None
        self._busy = self._idle = 0.0

    def add(self, span: Span) -> None:
        """Take in the next step, whose end may be still to come. Waits for nothing."""
        self._waiting.append(span)
        if len(self._waiting) >= _MANY:
            with self._lock:
                self._fold()

    def pause(self) -> None:
        """Until the next step there is nothing that the device could do."""
        self._waiting.append(None)

    @property
    def seconds(self) -> tuple[float, float]:
        """(busy, idle) so far, of the steps that are done."""
        with self._lock:
            self._fold()
            return self._busy, self._idle

    def _fold(self) -> None:
        for _ in range(len(self._waiting)):
            span = self._waiting[0]
            if span is not None and not span.done:
                return
            self._waiting.popleft()
            if span is not None:
                self._busy += span.seconds()
                if self._last is not None:
                    self._idle += max(0.0, span.seconds_after(self._last))
            self._last = span
