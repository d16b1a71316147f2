"""Tells a caller of `generate` how many of its rows are done while it waits. One callback for each thread; knows nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_local = threading.local()


@contextmanager
def track(callback: Callable[[int], None]) -> Iterator[None]:
    """Call `callback(num_finished_rows)` each time rows of this thread's `generate` calls finish.

    Blocks nest: the innermost one in the thread hears the rows, and the outer one is back afterwards.

    Args:
        callback: gets the number of rows that finished since it was called last; runs in the calling thread.
    """
    outer = getattr(_local, "callback", None)
    _local.callback = callback
    try:
        yield
    finally:
        _local.callback = outer


def report(num_finished_rows: int) -> None:
    """Tell this thread's tracker, if there is one, that rows finished. Called by whoever runs the thread's rows."""
    callback = getattr(_local, "callback", None)
    if callback is not None and num_finished_rows > 0:
        callback(num_finished_rows)
