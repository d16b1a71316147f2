"""What the prefix cache can do for a waiting request. Frozen, plain ints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class PageTail(NamedTuple):
    """The first tokens of a page that is copied, not shared.

    Attributes:
        source_page: holds them; written on after them, perhaps, never before.
        num_tokens: how many, at least 1 and at most a page of them.
    """

    source_page: int
    num_tokens: int


@dataclass(frozen=True)
class PrefixMatch:
    """What the prefix cache has for a waiting request. Good until pages are next allocated or tokens counted.

    Attributes:
        num_tokens: cached tokens, those of the tail included.
        in_flight: the tokens after them are being computed by a running request: waiting makes them a hit.
        num_unlocked_pages: shared pages that `admit` will take out of `num_available_pages`.
        tail: what to copy after the whole pages that are shared.
    """

    num_tokens: int
    in_flight: bool
    num_unlocked_pages: int = 0
    tail: PageTail | None = None

    @property
    def num_shared_tokens(self) -> int:
        """Tokens in whole pages of the tree."""
        return self.num_tokens - (self.tail.num_tokens if self.tail else 0)
