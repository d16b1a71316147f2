"""A blocking iterator for asyncio: each item is fetched in a worker thread. Knows nothing of engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


async def iterate_in_thread(make_iterator: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
    """Yield what `make_iterator()` yields; when the consumer leaves, the iterator is closed."""
    iterator = make_iterator()
    try:
        while True:
            item = await asyncio.to_thread(next, iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            await asyncio.to_thread(_close, close)


def _close(close: Callable[[], None]) -> None:
    with contextlib.suppress(ValueError):  # a cancelled fetch is still inside the generator; it ends with its thread
        close()
