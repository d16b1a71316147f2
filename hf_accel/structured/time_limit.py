"""A limit on the processor time of one compilation: set around it, checked in every loop that may be long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

from hf_accel.structured.syntax import TooLarge

_limit: ContextVar[tuple[float, float] | None] = ContextVar(
    "_limit", default=None
)  # (seconds, this thread's time at the end)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """What this thread does inside raises TooLarge, at its next `check_time`, once it has taken so long."""
    token = _limit.set((seconds, time.thread_time() + seconds))
    try:
        yield
    finally:
        _limit.reset(token)


def check_time() -> None:
    """Raise TooLarge if the time is over; without a limit it never is."""
    limit = _limit.get()
    if limit is not None and time.thread_time() > limit[1]:
        raise TooLarge(
            f"compiling the constraint takes more than {limit[0]:g} s: make it simpler, or use smaller bounds on repetitions and lengths"
        )
