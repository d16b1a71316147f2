"""Whether this thread is inside a step: what a step sets on the user's modules and configurations is for its thread alone.

Another thread may run the same model's plain forward meanwhile, and must get the model's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_thread = threading.local()


def in_step() -> bool:
    """Whether a `step()` of this thread is open."""
    return getattr(_thread, "depth", 0) > 0


@contextlib.contextmanager
def step() -> Iterator[None]:
    """Marks this thread while open; may be nested."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1
