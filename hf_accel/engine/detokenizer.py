"""Turns a stream of token ids into a stream of text, and ends it at a stop string.

Owns what text is safe to hand out. Knows the tokenizer only by its `decode`, and nothing of requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what `decode` gives for bytes that are not (yet) a character
_MAX_WINDOW = 16  # tokens decoded again at each push
_HARD_WINDOW = 64  # the same, where no shorter window agrees with the longer one
_MIN_KEPT, _MAX_KEPT = 6, 12  # tokens kept when the window moves on
_MAX_CHARACTER = 4  # bytes, hence tokens, of one character
_MAX_UNREADABLE = 16  # replacement characters held back at the end of the text


class Decoder(Protocol):
    """The part of a HuggingFace tokenizer that is needed."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of some tokens."""
        ...


class IncrementalDetokenizer:
    """Text of one request, token by token, at a cost per token that does not grow with the text.

    A short window of tokens is decoded at each push, and what it adds to the window's text before is new: so the tokens
    are always decoded in the context of those before them (spaces of sentencepiece models, characters over several
    tokens). Held back are replacement characters at the end, which may become a character, and text that may be the
    beginning of a stop string. All pushes and the flush together give `decode(prompt + output)` less `decode(prompt)`,
    or `decode(output)` where no prompt is given, without clean-up of spaces. One exception: byte-fallback decoders
    declare a whole run of bytes unreadable for one bad byte in it, also those before it that were handed out by then.

    Args:
        tokenizer: a HuggingFace tokenizer, or anything with its `decode`.
        stop: strings that end the text; the one that is complete first wins (of two, the longer), whatever the tokens.
        skip_special_tokens: as `decode`'s.
        prompt_token_ids: the text is a continuation of this.

    Attributes:
        finished_by: the stop string that ended the text; None so far.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) and s for s in self._stop):
            raise ValueError(f"stop must be non-empty strings, got {stop!r}")
        self._skip_special_tokens = skip_special_tokens
        self.finished_by: str | None = None
        self._window: list[int] = []  # the last tokens
        self._handed = ""  # the window's text that has been handed on, or is the prompt's
        self._prompt_tail = ""  # unreadable end of the prompt: its own, or a character's beginning
        if prompt_token_ids:
            self._begin_after(list(prompt_token_ids[-(_MAX_WINDOW + _MAX_CHARACTER) :]))
        self._num_unclear = 0  # tokens since the window's text last continued what was handed on
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._released: list[str] = []

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return "".join(self._released)

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is now safe, often "". After a stop string: always ""."""
        if self.finished_by is not None:
            return ""
        self._window.append(token_id)
        decoded = self._decode(self._window)
        if decoded.startswith(self._handed):
            new = self._hand_on(decoded, _readable(decoded))
            if len(self._window) > _MAX_WINDOW:
                self._move_window(decoded)
        else:
            self._num_unclear += 1
            if decoded.endswith(_REPLACEMENT) and self._num_unclear < _MAX_CHARACTER:
                return ""  # a character is on its way
            new = self._start_over(final=False)
        return self._release(new, final=False)

    def flush(self) -> str:
        """The end of the request: returns what was held back."""
        if self.finished_by is not None:
            return ""
        decoded = self._decode(self._window)
        if decoded.startswith(self._handed):
            new = self._hand_on(decoded, decoded)
        else:
            new = self._start_over(final=True)
        return self._release(new, final=True)

    # -- tokens to text --

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _begin_after(self, prompt: list[int]) -> None:
        """Start with a window on the prompt's last tokens.

        The prompt may end inside a character, and a window may begin inside one; either may make the whole window
        unreadable. So look for a window that is readable at both ends but for its last few tokens.
        """
        for num_kept, num_cut in itertools.product(
            range(_MAX_WINDOW, _MAX_WINDOW + _MAX_CHARACTER), range(_MAX_CHARACTER)
        ):
            self._window = prompt[-num_kept:]
            before = self._decode(self._window[: len(self._window) - num_cut])
            if before and before[0] != _REPLACEMENT and before[-1] != _REPLACEMENT:
                break
        else:
            before = ""
        text = self._decode(self._window)
        self._handed = max(before, text.rstrip(_REPLACEMENT), key=len)
        self._prompt_tail = text.removeprefix(self._handed) if text.startswith(self._handed) else ""

    def _hand_on(self, decoded: str, readable: str) -> str:
        """Hand on the window's text up to `readable`, a prefix of `decoded`."""
        self._num_unclear = 0
        if len(readable) <= len(self._handed):
            return ""
        new = readable[len(self._handed) :]
        self._handed = readable
        new, self._prompt_tail = new.removeprefix(self._prompt_tail), ""
        return new

    def _start_over(self, final: bool) -> str:
        """The window's text has changed backwards: go on from the tokens since, and the one before them for context."""
        self._window = self._window[-(self._num_unclear + 1) :]
        self._handed = self._decode(self._window[:1])
        decoded = self._decode(self._window)
        if not decoded.startswith(self._handed):
            self._handed = ""
        return self._hand_on(decoded, decoded if final else _readable(decoded))

    def _move_window(self, decoded: str) -> None:
        """Shorten the window to its last tokens, where these decode alone as they do in the longer one.

        A window may begin inside a character: UTF-8 falls into step again, so only its first characters are wrong.
        """
        num_pending = len(decoded) - len(self._handed)
        for num_kept in range(_MIN_KEPT, _MAX_KEPT):
            text = self._decode(self._window[-num_kept:])
            in_step = text.lstrip(_REPLACEMENT)
            if in_step.rstrip(_REPLACEMENT) and decoded.endswith(in_step):
                break
        else:
            if len(self._window) < _HARD_WINDOW:
                return
            text = self._decode(self._window[-num_kept:])
        self._window = self._window[-num_kept:]
        self._handed = text[: max(len(text) - num_pending, 0)]

    # -- stop strings --

    def _release(self, new: str, final: bool) -> str:
        """Hand out new text, as far as no stop string may begin in it."""
        if not self._stop:
            self._released.append(new)
            return new
        self._held += new
        found = [(start + len(s), start, s) for s in self._stop if (start := self._held.find(s)) >= 0]
        if found:
            _, end, self.finished_by = min(found)
        else:
            end = len(self._held) - (0 if final else self._num_possible_stop())
        safe, self._held = self._held[:end], self._held[end:]
        self._released.append(safe)
        return safe

    def _num_possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _readable(decoded: str) -> str:
    """The text without the replacement characters at its end, unless there are too many to be one run of characters."""
    readable = decoded.rstrip(_REPLACEMENT)
    if len(decoded) - len(readable) > _MAX_UNREADABLE:
        return decoded[: 1 - _MAX_CHARACTER]
    return readable
