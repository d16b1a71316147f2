"""What running requests hold, and which page each of them computes next: found by the tokens of that page."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from hf_accel.kv_cache.radix_node import PageKey, RadixNode, closest_key
from hf_accel.request import Request


@dataclass(eq=False, slots=True)
class Holding:
    """The pages of one admitted request.

    Attributes:
        request: whose.
        node: where its part of the prefix tree ends; locked once for this request.
        page_ids: its pages in order.
        num_committed: how many of them, from the start, belong to the tree.
        next_key: its tokens in the page after those, up to a page of them, as known at its admission or last commit.
    """

    request: Request
    node: RadixNode
    page_ids: list[int]
    num_committed: int
    next_key: PageKey = ()


class NextPages:
    """The holdings with a next key, by the node where they end and that key.

    A tree position has one node that ends there for as long as someone holds it, so the node stands for all tokens before
    the page, whichever request looks.
    """

    def __init__(self) -> None:
        self._keys: dict[RadixNode, list[PageKey]] = {}  # sorted, each once
        self._holdings: dict[tuple[RadixNode, PageKey], list[Holding]] = {}  # the first one came first

    def add(self, holding: Holding) -> None:
        """Enter a holding under its node and next key."""
        entry = (holding.node, holding.next_key)
        if entry not in self._holdings:
            self._holdings[entry] = []
            bisect.insort(self._keys.setdefault(holding.node, []), holding.next_key)
        self._holdings[entry].append(holding)

    def remove(self, holding: Holding) -> None:
        """Take back the entry that the holding made, and no other's."""
        entry = (holding.node, holding.next_key)
        self._holdings[entry].remove(holding)
        if self._holdings[entry]:
            return
        del self._holdings[entry]
        keys = self._keys[holding.node]
        del keys[bisect.bisect_left(keys, holding.next_key)]
        if not keys:
            del self._keys[holding.node]

    def longest_common(self, node: RadixNode, tokens: PageKey) -> tuple[Holding | None, int]:
        """A holding that ends at `node` whose next key has the longest common beginning with `tokens`. O(log n).

        Returns:
            it (the oldest with that key), and how many tokens are common; (None, 0) if no key has one.
        """
        key, num_common = closest_key(self._keys.get(node, ()), tokens)
        return (self._holdings[node, key][0], num_common) if num_common else (None, 0)

    def check_integrity(self, holdings: Sequence[Holding]) -> None:
        """Verify that exactly the holdings with a next key are entered, under what they say. O(holdings)."""
        entered = [holding for group in self._holdings.values() for holding in group]
        expected = [holding for holding in holdings if holding.next_key]
        assert len(entered) == len(expected) and set(entered) == set(expected), (
            "in-flight marks differ from the requests"
        )
        for (node, key), group in self._holdings.items():
            assert all(h.node is node and h.next_key == key for h in group), "an in-flight mark of another page"
        keys: dict[RadixNode, list[PageKey]] = {}
        for node, key in self._holdings:
            keys.setdefault(node, []).append(key)
        assert {node: sorted(found) for node, found in keys.items()} == self._keys, "the sorted keys are not the marks"
