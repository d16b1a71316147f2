"""Holds Ctrl-C back while bookkeeping is half done. Python delivers it to the main thread alone, between any two bytecodes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptGate:
    """Remembers SIGINT instead of raising it, except inside `open()`."""

    def __init__(self) -> None:
        self._previous = signal.getsignal(signal.SIGINT)
        is_main = threading.current_thread() is threading.main_thread()
        self._in_force = is_main and callable(self._previous)
        self._is_open = False
        self._pending: list[tuple[int, FrameType | None]] = []

    def close(self) -> None:
        """From now on SIGINT waits. The handler is put in place once; `open` only sets a flag, which costs a step less."""
        self._is_open = False
        if self._in_force:
            signal.signal(signal.SIGINT, self._handle)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, SIGINT goes to the handler that was there, a remembered one at once."""
        self._is_open = True
        try:
            self._deliver()
            yield
        finally:
            self._is_open = False

    def let_through(self) -> None:
        """Put the old handler back and hand it what was remembered."""
        if self._in_force:
            signal.signal(signal.SIGINT, self._previous)
            self._deliver()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pending.append((number, frame))
        if self._is_open:
            self._deliver()

    def _deliver(self) -> None:
        if self._pending and callable(self._previous):
            self._previous(*self._pending.pop())


@contextmanager
def interrupts_deferred() -> Iterator[InterruptGate]:
    """While the block runs, SIGINT waits for its end."""
    gate = InterruptGate()
    gate.close()
    try:
        yield gate
    finally:
        gate.let_through()
