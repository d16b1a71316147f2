"""The prefix tree: which page holds the KV of which tokens, who holds it, and what goes first when room is needed.

Follows RadixAttention (SGLang, arXiv 2312.07104) at page granularity. An edge's label is a list of page keys (the tuple
of one full page's token ids), so nodes split between pages only. Below any node there may also be partial pages: leaves
for good, never locked, since their users copy them. Among siblings no first key is a prefix of another. Knows neither
requests nor the free list: the pages that it gives up are returned, and the caller frees them.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

from hf_accel.kv_cache.eviction_queue import EvictionQueue
from hf_accel.kv_cache.radix_node import PageKey, RadixNode, closest_key, count_common


class RadixCache:
    """A tree for each namespace, one least-recently-used order over all of them.

    Args:
        page_size: tokens in a full page.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._roots: dict[Hashable, RadixNode] = {}
        self._num_evictable = 0
        self._num_protected = 0
        self._tick = 0
        self._queue = EvictionQueue()

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
    ) -> tuple[RadixNode, list[int], list[int]]:
        """Add full pages below `node`, where an earlier match or insert ended.

        Args:
            node: where the keys continue.
            page_keys: keys of the pages to add.
            page_ids: their pages, one for each key.
            owned: the caller holds the one lock on `node`: a leaf may then grow in place, its handle stays true.

        Returns:
            the node that ends at the last key; the page that the tree holds for each key (where that differs from the
            given page the key was there before, and the given page stays the caller's); and the pages that the tree gave
            up, which are partial ones that the new pages extend.
        """
        assert len(page_keys) == len(page_ids), (len(page_keys), len(page_ids))
        assert node.parent is not None or self._roots.get(node.namespace) is node, (
            "insert below a node that was dropped"
        )
        end, held = self._descend(node, page_keys, len(page_keys))
        rest_keys, rest_ids = list(page_keys[len(held) :]), list(page_ids[len(held) :])
        if not rest_keys:
            return end, held, []
        dropped = self._drop_partial(end.child_that_starts(rest_keys[0]))
        if owned and end is node and node.parent is not None and not node.children and node.lock_count == 1:
            node.page_keys += rest_keys
            node.page_ids += rest_ids
            self._num_protected += len(rest_ids)
        else:
            end = self._attach(RadixNode(end, rest_keys, rest_ids))
        return end, held + rest_ids, dropped

    def insert_partial(self, node: RadixNode, key: PageKey, page_id: int) -> list[int]:
        """Add a partial page below `node`, unless a child holds its tokens already.

        Args:
            node: locked by the caller.
            key: at least one token, fewer than a page holds.
            page_id: its page.

        Returns:
            the pages that are the caller's now: the given one if it was not taken, and one that it extends if it was.
        """
        assert 0 < len(key) < self.page_size, f"{len(key)} tokens are no partial page of {self.page_size}"
        assert node.lock_count > 0, "a partial page below a node that may leave the tree"
        if node.child_that_continues(key) is not None:
            return [page_id]
        dropped = self._drop_partial(node.child_that_starts(key))
        self._tick += 1
        self._attach(RadixNode(node, [key], [page_id]))
        return dropped

    def longest_common(self, node: RadixNode, tokens: PageKey) -> tuple[int, int]:
        """A page right below `node`, full or partial, that has the longest common beginning with `tokens`. O(log n).

        For a partial page that counts as a use; a full page's node may go on with pages that are of no use here.

        Returns:
            its id, and how many tokens are common (0: none has one, the id is -1).
        """
        key, num_common = closest_key(node.child_keys, tokens)
        if not num_common:
            return -1, 0
        child = node.children[key]
        if len(key) < self.page_size:
            child.last_used = self._tick
        return child.page_ids[0], num_common

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
        while len(evicted) < num_pages and (node := self._queue.pop()) is not None:
            evicted += self._drop_tail(node, num_pages - len(evicted))
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
        for node in reversed(list(root.subtree())):  # children before their parents
            if node.lock_count > 0:
                continue
            dropped += node.page_ids
            if node.parent is not None:
                node.detach()
            else:
                del self._roots[namespace]
        self._num_evictable -= len(dropped)
        self._queue.purge()
        for node in root.subtree():
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
        self._queue.clear()
        self._num_evictable = 0
        return page_ids

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots included, parents before their children."""
        for root in self._roots.values():
            yield from root.subtree()

    def check_integrity(self) -> None:
        """Verify the links, keys, counts, locks and the eviction heap. O(pages)."""
        self._queue.check_integrity(self.nodes())
        num_pages = num_evictable = 0
        seen: set[int] = set()
        for node in self.nodes():
            self._check_node(node)
            seen.update(node.page_ids)
            num_pages += len(node.page_ids)
            num_evictable += len(node.page_ids) if node.lock_count == 0 else 0
        assert len(seen) == num_pages, "a page is in the tree twice"
        assert (num_evictable, num_pages - num_evictable) == (self._num_evictable, self._num_protected)
        assert all(root.namespace == namespace for namespace, root in self._roots.items())

    def _check_node(self, node: RadixNode) -> None:
        assert len(node.page_keys) == len(node.page_ids)
        assert (node.parent is None) == (not node.page_ids), "only a root has no pages"
        assert sum(child.lock_count for child in node.children.values()) <= node.lock_count, "lock not up to the root"
        for first_key, child in node.children.items():
            assert child.parent is node and child.page_keys[0] == first_key
        assert node.child_keys == sorted(node.children), "the sorted keys are not the children"
        for key, after in itertools.pairwise(node.child_keys):  # a prefix comes right before what it begins
            assert after[: len(key)] != key, "a page begins like its sibling's, and goes on"
        sizes = {len(key) for key in node.page_keys}
        if sizes - {self.page_size}:
            assert len(node.page_ids) == 1 and 0 < sizes.pop() < self.page_size, "a partial page inside a run"
            assert not node.children and not node.lock_count, "a partial page with a child or a lock"

    def _descend(self, node: RadixNode, page_keys: Sequence[PageKey], stop: int) -> tuple[RadixNode, list[int]]:
        """Follow `page_keys[:stop]` below `node` as far as the tree goes, marking the nodes as used."""
        self._tick += 1
        page_ids: list[int] = []
        while len(page_ids) < stop:
            child = node.children.get(page_keys[len(page_ids)])
            if child is None:
                break
            first = len(page_ids)
            num_common = count_common(child.page_keys, page_keys[first : min(stop, first + len(child.page_keys))])
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
        parent.children[upper.page_keys[0]] = upper  # the key is the same, and keeps its place
        del node.page_keys[:num_pages], node.page_ids[:num_pages]
        node.parent = upper
        node.attach()
        return upper

    def _attach(self, node: RadixNode) -> RadixNode:
        """Put a new unlocked leaf below its parent."""
        node.attach()
        node.last_used = self._tick
        self._num_evictable += len(node.page_ids)
        self._queue_if_evictable(node)
        return node

    def _drop_partial(self, node: RadixNode | None) -> list[int]:
        """Take a partial page that a new sibling extends out of the tree."""
        if node is None:
            return []
        node.detach()
        self._queue.note_left()
        self._num_evictable -= 1
        return node.page_ids

    def _drop_tail(self, node: RadixNode, num_pages: int) -> list[int]:
        """Take up to `num_pages` pages off the end of an unlocked leaf, which leaves the tree with its first page."""
        parent = node.parent
        assert parent is not None
        first = max(0, len(node.page_ids) - num_pages)
        dropped = node.page_ids[first:]
        self._num_evictable -= len(dropped)
        if first:
            del node.page_ids[first:], node.page_keys[first:]
            self._queue_if_evictable(node)
        else:
            node.detach()
            self._queue_if_evictable(parent)
        return dropped[::-1]

    def _queue_if_evictable(self, node: RadixNode) -> None:
        """Make an unlocked leaf a candidate for eviction; drop a root that is one."""
        if node.lock_count > 0 or node.children:
            return
        if node.parent is None:
            if self._roots.get(node.namespace) is node:
                del self._roots[node.namespace]
        else:
            self._queue.add(node)
