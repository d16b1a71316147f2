"""Nodes of the prefix tree, and page keys in sorted lists. Knows no locks' meaning, no order of eviction."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeAlias

PageKey: TypeAlias = tuple[int, ...]  # the token ids of a page; of a partial page, fewer than page_size


class RadixNode:
    """A run of full pages below `parent`, or one partial page. As a handle it means "from the root to my last page".

    Attributes:
        parent: None for a root, and for a node that left the tree.
        children: by the first page key of each.
        child_keys: the keys of `children`, sorted.
        page_keys: token ids of each page here.
        page_ids: the page of each key.
        lock_count: handles locked at this node or below it.
        last_used: tick of the last use; exact for an unlocked leaf, may lag elsewhere (see `RadixCache.evict`).
        queued: whether the eviction heap has an entry for it.
        namespace: of a root (None elsewhere).
    """

    __slots__ = (
        "child_keys", "children", "last_used", "lock_count", "namespace", "page_ids", "page_keys", "parent", "queued",
    )  # fmt: skip

    def __init__(
        self, parent: RadixNode | None, page_keys: list[PageKey], page_ids: list[int], namespace: Hashable = None
    ) -> None:
        self.parent = parent
        self.children: dict[PageKey, RadixNode] = {}
        self.child_keys: list[PageKey] = []
        self.page_keys = page_keys
        self.page_ids = page_ids
        self.lock_count = 0
        self.last_used = 0
        self.queued = False
        self.namespace = namespace

    def path(self) -> list[RadixNode]:
        """The nodes from the root down to this one."""
        nodes = []
        node: RadixNode | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def subtree(self) -> Iterator[RadixNode]:
        """This node and everything below it, parents before their children."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def attach(self) -> None:
        """Become a child of `parent`."""
        assert self.parent is not None
        key = self.page_keys[0]
        self.parent.children[key] = self
        bisect.insort(self.parent.child_keys, key)

    def detach(self) -> None:
        """Leave the tree."""
        parent = self.parent
        assert parent is not None
        key = self.page_keys[0]
        del parent.children[key]
        del parent.child_keys[bisect.bisect_left(parent.child_keys, key)]
        self.parent = None

    def child_that_starts(self, key: PageKey) -> RadixNode | None:
        """The child whose first key is a proper prefix of `key`: at most one is, since no sibling's key is another's."""
        index = bisect.bisect_left(self.child_keys, key)
        if index > 0 and _starts(self.child_keys[index - 1], key):
            return self.children[self.child_keys[index - 1]]
        return None

    def child_that_continues(self, key: PageKey) -> RadixNode | None:
        """A child whose first key is `key` or begins with it."""
        index = bisect.bisect_left(self.child_keys, key)
        if index < len(self.child_keys) and _starts(key, self.child_keys[index]):
            return self.children[self.child_keys[index]]
        return None


def closest_key(keys: Sequence[PageKey], tokens: PageKey) -> tuple[PageKey, int]:
    """Of a sorted list, a key with the longest common prefix with `tokens`, and its length (the key is () for 0).

    That key is a neighbour of the place where `tokens` would be inserted: between it and any other key with so long a
    common prefix there are only keys that share it too. O(log n).
    """
    index = bisect.bisect_left(keys, tokens)
    best: PageKey = ()
    num_best = 0
    for key in keys[max(0, index - 1) : index + 1]:
        num_common = count_common(key, tokens)
        if num_common > num_best:
            best, num_best = key, num_common
    return best, num_best


def count_common(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:  # one C comparison in the usual case
        return length
    return next((i for i in range(length) if a[i] != b[i]), length)


def _starts(prefix: PageKey, key: PageKey) -> bool:
    return key[: len(prefix)] == prefix
