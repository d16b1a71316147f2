"""Text as it is generated, from one prompt or many at once. Runs one `generate` call a thread: the engine joins them.

Knows HF's streamer protocol and nothing of the engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils.chat_template_utils import Chat, is_valid_message

MAX_THREADS = 64


class StreamClosedError(Exception):
    """Ends a `generate` call whose reader has left."""


class PieceStreamer(BaseStreamer):
    """Turns the token ids of one sequence into pieces of text that join to the decoded whole.

    A piece is held back while it ends in the middle of a character.

    Args:
        emit: gets each piece.
        tokenizer: decodes.
        decoding: keyword arguments of `tokenizer.decode`.
        closed: when set, the next token raises StreamClosedError inside `generate`.
    """

    def __init__(
        self, emit: Callable[[str], None], tokenizer: Any, decoding: Mapping[str, Any], closed: threading.Event
    ) -> None:
        self._emit, self._tokenizer, self._decoding, self._closed = emit, tokenizer, dict(decoding), closed
        self._ids: list[int] = []
        self._start = self._read = 0  # text of ids[:_read] is out; ids[_start:] is decoded again for its context
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt `[1, num_tokens]` (ignored), then new tokens `[1]`."""
        if self._closed.is_set():
            raise StreamClosedError
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.reshape(-1).tolist()
        self._flush(final=False)

    def end(self) -> None:
        """Give out what was held back."""
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not final:
            return
        if len(text) > len(known):
            self._emit(text[len(known) :])
            self._start, self._read = self._read, len(self._ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, **self._decoding) if ids else ""


def as_items(inputs: Any) -> tuple[list[Any], bool]:
    """Prompts of a pipeline's input, chats wrapped as HF's pipeline does, and whether it was a single one."""
    if isinstance(inputs, str):
        return [inputs], True
    items = list(inputs)
    if not items:
        return [], False
    if is_valid_message(items[0]):
        return [Chat(items)], True
    is_chats = isinstance(items[0], (list, tuple)) and all(chat and is_valid_message(chat[0]) for chat in items)
    return ([Chat(chat) for chat in items] if is_chats else items), False


def stream(
    generate: Callable[[Any, BaseStreamer], None],
    items: Sequence[Any],
    tokenizer: Any,
    decoding: Mapping[str, Any],
    max_threads: int,
) -> Iterator[tuple[int, str]]:
    """Yield `(index, piece)` as pieces come. Leaving the iterator stops the calls at their next token.

    Args:
        generate: runs one prompt to its end, feeding the streamer.
        max_threads: prompts that run at once, at most 64.

    Raises:
        Exception: what a call raised; the others are stopped.
    """
    if not items:
        return
    pieces: queue.SimpleQueue[tuple[int, str | BaseException | None]] = queue.SimpleQueue()
    closed = threading.Event()

    def work(index: int) -> None:
        try:
            if not closed.is_set():
                generate(items[index], PieceStreamer(lambda p: pieces.put((index, p)), tokenizer, decoding, closed))
            pieces.put((index, None))
        except BaseException as error:  # handed to the reader
            pieces.put((index, error))

    pool = ThreadPoolExecutor(min(len(items), max_threads, MAX_THREADS), thread_name_prefix="hf-accel-stream")
    try:
        for index in range(len(items)):
            pool.submit(work, index)
        running = len(items)
        while running:
            index, piece = pieces.get()
            if piece is None:
                running -= 1
            elif isinstance(piece, BaseException):
                raise piece
            else:
                yield index, piece
    finally:
        closed.set()
        pool.shutdown(wait=True, cancel_futures=True)
