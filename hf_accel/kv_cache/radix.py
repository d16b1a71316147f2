"""The prefix tree: which page holds the KV of which tokens, who holds it, and what goes first when room is needed.

Follows RadixAttention (SGLang, arXiv 2312.07104) at page granularity. An edge's label is a list of page keys (the tuple
of one full page's token ids), so nodes split between pages only. Knows neither requests nor the free list: the pages
that it gives up are returned, and the caller frees them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeAlias

PageKey: TypeAlias = tuple[int, ...]


class RadixNode:
    """A run of pages below `parent`. As a handle it means "everything from the root to my last page".

    Attributes:
        parent: None for a root, and for a node that left the tree.
        children: by the first page key of each.
        page_keys: token ids of each page here.
        page_ids: the page of each key.
        lock_count: handles locked at this node or below it.
        last_used: tick of the last use; exact for an unlocked leaf, may lag elsewhere (see `RadixCache.evict`).
        queued: whether the eviction heap has an entry for it.
        namespace: of a root (None elsewhere).
    """

    __slots__ = ("children", "last_used", "lock_count", "namespace", "page_ids", "page_keys", "parent", "queued")

    def __init__(
        self, parent: RadixNode | None, page_keys: list[PageKey], page_ids: list[int], namespace: Hashable = None
    ) -> None:
        self.parent = parent
        self.children: dict[PageKey, RadixNode] = {}
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


class RadixCache:
    """A tree for each namespace, one least-recently-used order over all of them."""

    def __init__(self) -> None:
        self._roots: dict[Hashable, RadixNode] = {}
        self._num_evictable = 0
        self._num_protected = 0
        self._tick = 0
        # Eviction candidates as (last_used when pushed, serial, node). An entry's time is never later than the node's
        # and is corrected when it surfaces, so a use costs nothing here. Every unlocked leaf has exactly one entry.
        self._heap: list[tuple[int, int, RadixNode]] = []
        self._serial = itertools.count()

    @property
    def num_evictable_pages(self) -> int:
        """Pages that `evict` could give up."""
        return self._num_evictable

    @property
    def num_protected_pages(self) -> int:
        """Pages under a lock."""
        return self._num_protected

    def __contains__(self, namespace: Hashable) -> bool:
        """Whether the namespace holds a page or a lock."""
        return namespace in self._roots

    def match(self, namespace: Hashable, page_keys: Sequence[PageKey], limit_pages: int) -> tuple[RadixNode, list[int]]:
        """Find the longest cached prefix of `page_keys[:limit_pages]`.

        Returns:
            the node that ends exactly where the match ends (a longer one is split; an unknown namespace gets a root,
            which lives until its last page or lock goes), and the page ids from the root to there.
        """
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = RadixNode(None, [], [], namespace)
        return self._descend(root, page_keys, min(limit_pages, len(page_keys)))

    def insert(
        self, node: RadixNode, page_keys: Sequence[PageKey], page_ids: Sequence[int], *, owned: bool = False
    ) -> tuple[RadixNode, list[int]]:
        """Add pages below `node`, where an earlier match or insert ended.

        Args:
            node: where the keys continue.
            page_keys: keys of the pages to add.
            page_ids: their pages, one for each key.
            owned: the caller holds the one lock on `node`: a leaf may then grow in place, its handle stays true.

        Returns:
            the node that ends at the last key, and the page that the tree holds for each key. Where that differs from
            the given page the key was there before, and the given page stays the caller's.
        """
        assert len(page_keys) == len(page_ids), (len(page_keys), len(page_ids))
        assert node.parent is not None or self._roots.get(node.namespace) is node, (
            "insert below a node that was dropped"
        )
        end, held = self._descend(node, page_keys, len(page_keys))
        rest_keys, rest_ids = list(page_keys[len(held) :]), list(page_ids[len(held) :])
        if not rest_keys:
            return end, held
        if owned and end is node and node.parent is not None and not node.children and node.lock_count == 1:
            node.page_keys += rest_keys
            node.page_ids += rest_ids
            self._num_protected += len(rest_ids)
        else:
            parent, end = end, RadixNode(end, rest_keys, rest_ids)
            parent.children[rest_keys[0]] = end
            end.last_used = self._tick
            self._num_evictable += len(rest_ids)
            self._queue_if_evictable(end)
        return end, held + rest_ids

    def lock(self, node: RadixNode, *, below: RadixNode | None = None) -> None:
        """Protect every page from the root to `node`; with `below`, an ancestor locked by the caller, move that lock
        down to `node` (only the nodes between are visited)."""
        current: RadixNode | None = node
        while current is not below:
            assert current is not None, "`below` is not an ancestor"
            if current.lock_count == 0:
                self._num_evictable -= len(current.page_ids)
                self._num_protected += len(current.page_ids)
            current.lock_count += 1
            current = current.parent

    def unlock(self, node: RadixNode) -> None:
        """Undo one `lock(node)`. The pages count as used now."""
        assert node.lock_count > 0, "unlock without a lock"
        self._tick += 1
        for current in node.path():
            current.lock_count -= 1
            current.last_used = self._tick
            if current.lock_count == 0:
                self._num_protected -= len(current.page_ids)
                self._num_evictable += len(current.page_ids)
                self._queue_if_evictable(current)

    def count_unlocked(self, node: RadixNode) -> int:
        """Pages from the root to `node` that `lock(node)` would take from the evictable ones."""
        num_pages = 0
        current: RadixNode | None = node
        while current is not None and current.lock_count == 0:
            num_pages += len(current.page_ids)
            current = current.parent
        return num_pages

    def evict(self, num_pages: int) -> list[int]:
        """Give up the `num_pages` least recently used unlocked pages, or all of them if they are fewer.

        A page goes before the pages that it continues. Costs O(log n) for a leaf, nothing for the rest of the tree.
        A use of a page is a use of all before it. That is not written to inner nodes, and need not be: when the last
        child goes as the least recently used leaf, its parent is next whether its own time lags or not.

        Returns:
            page ids, in the order in which they left.
        """
        evicted: list[int] = []
        while len(evicted) < num_pages and self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            node.queued = False
            if last_used == node.last_used and node.lock_count == 0 and not node.children:
                evicted += self._drop_tail(node, num_pages - len(evicted))
            else:
                self._queue_if_evictable(node)
        return evicted

    def clear_namespace(self, namespace: Hashable) -> list[int]:
        """Drop every unlocked page of a namespace. O(its nodes + eviction candidates).

        Returns:
            their page ids.
        """
        root = self._roots.get(namespace)
        if root is None:
            return []
        dropped: list[int] = []
        for node in reversed(list(_subtree(root))):  # children before their parents
            if node.lock_count > 0:
                continue
            dropped += node.page_ids
            if node.parent is not None:
                del node.parent.children[node.page_keys[0]]
                node.parent = None
            else:
                del self._roots[namespace]
        self._num_evictable -= len(dropped)
        self._heap = [entry for entry in self._heap if entry[2].parent is not None]
        heapq.heapify(self._heap)
        for node in _subtree(root):
            self._queue_if_evictable(node)
        return dropped

    def reset(self) -> list[int]:
        """Forget everything.

        Returns:
            the page ids that it held.
        """
        assert all(root.lock_count == 0 for root in self._roots.values()), "reset under a lock"
        page_ids = [page_id for node in self.nodes() for page_id in node.page_ids]
        self._roots.clear()
        self._heap.clear()
        self._num_evictable = 0
        return page_ids

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots included, parents before their children."""
        for root in self._roots.values():
            yield from _subtree(root)

    def check_integrity(self) -> None:
        """Verify the links, counts, locks and the eviction heap. O(pages)."""
        seen: set[int] = set()
        num_pages = num_evictable = 0
        queued = {node: last_used for last_used, _, node in self._heap}
        assert len(queued) == len(self._heap), "a node is in the eviction heap twice"
        for node in self.nodes():
            assert len(node.page_keys) == len(node.page_ids)
            assert (node.parent is None) == (not node.page_ids), "only a root has no pages"
            assert sum(child.lock_count for child in node.children.values()) <= node.lock_count, (
                "lock not up to the root"
            )
            for first_key, child in node.children.items():
                assert child.parent is node and child.page_keys[0] == first_key
            seen.update(node.page_ids)
            num_pages += len(node.page_ids)
            num_evictable += len(node.page_ids) if node.lock_count == 0 else 0
            assert node.queued == (node in queued)
            if node.parent is not None and node.lock_count == 0 and not node.children:
                assert node.queued and queued[node] <= node.last_used, "an unlocked leaf can never be evicted"
            queued.pop(node, None)
        assert not queued, "the eviction heap holds nodes that left the tree"
        assert len(seen) == num_pages, "a page is in the tree twice"
        assert (num_evictable, num_pages - num_evictable) == (self._num_evictable, self._num_protected)
        assert all(root.namespace == namespace for namespace, root in self._roots.items())

    def _descend(self, node: RadixNode, page_keys: Sequence[PageKey], stop: int) -> tuple[RadixNode, list[int]]:
        """Follow `page_keys[:stop]` below `node` as far as the tree goes, marking the nodes as used."""
        self._tick += 1
        page_ids: list[int] = []
        while len(page_ids) < stop:
            child = node.children.get(page_keys[len(page_ids)])
            if child is None:
                break
            num_common = _count_common(child.page_keys, page_keys, len(page_ids), stop)
            if num_common < len(child.page_keys):
                child = self._split(child, num_common)
            child.last_used = self._tick
            page_ids += child.page_ids
            node = child
        return node, page_ids

    def _split(self, node: RadixNode, num_pages: int) -> RadixNode:
        """Move the first `num_pages` pages of `node` to a new parent. `node` keeps its end, so handles stay true."""
        parent = node.parent
        assert parent is not None
        upper = RadixNode(parent, node.page_keys[:num_pages], node.page_ids[:num_pages])
        upper.lock_count = node.lock_count
        parent.children[upper.page_keys[0]] = upper
        upper.children[node.page_keys[num_pages]] = node
        node.parent = upper
        del node.page_keys[:num_pages], node.page_ids[:num_pages]
        return upper

    def _drop_tail(self, node: RadixNode, num_pages: int) -> list[int]:
        """Take up to `num_pages` pages off the end of an unlocked leaf, which leaves the tree with its first page."""
        parent, first_key = node.parent, node.page_keys[0]
        assert parent is not None
        first = max(0, len(node.page_ids) - num_pages)
        dropped = node.page_ids[first:]
        del node.page_ids[first:], node.page_keys[first:]
        self._num_evictable -= len(dropped)
        if node.page_ids:
            self._queue_if_evictable(node)
        else:
            del parent.children[first_key]
            node.parent = None
            self._queue_if_evictable(parent)
        return dropped[::-1]

    def _queue_if_evictable(self, node: RadixNode) -> None:
        """Make an unlocked leaf a candidate for eviction; drop a root that is one."""
        if node.lock_count > 0 or node.children:
            return
        if node.parent is None:
            if self._roots.get(node.namespace) is node:
                del self._roots[node.namespace]
        elif not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (node.last_used, next(self._serial), node))


def _count_common(node_keys: list[PageKey], page_keys: Sequence[PageKey], start: int, stop: int) -> int:
    """How many keys of a node agree with `page_keys[start:stop]`."""
    length = min(len(node_keys), stop - start)
    if node_keys[:length] == page_keys[start : start + length]:  # one C comparison in the usual case
        return length
    return next((i for i in range(length) if node_keys[i] != page_keys[start + i]), length)


def _subtree(root: RadixNode) -> Iterator[RadixNode]:
    """`root` and everything below it, parents before their children."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
