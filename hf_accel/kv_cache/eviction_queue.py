"""Which leaf of the prefix tree was used least recently: a heap that is corrected late. Knows no pages."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable

from hf_accel.kv_cache.radix_node import RadixNode

MIN_STALE = 64


class EvictionQueue:
    """Every unlocked leaf of a tree, once; inner and locked nodes may be in it too.

    An entry is (`last_used` when it was pushed, serial, node). Its time is never later than the node's and is set right when
    it surfaces, so a use costs nothing here. `_num_stale` entries are of nodes that have left the tree.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, RadixNode]] = []
        self._num_stale = 0
        self._serial = itertools.count()

    def add(self, node: RadixNode) -> None:
        """Make a node a candidate. Does nothing for one that is."""
        if not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (node.last_used, next(self._serial), node))

    def pop(self) -> RadixNode | None:
        """Take out the least recently used unlocked leaf; None if there is none."""
        while self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            if node.parent is None:
                self._num_stale -= 1
                continue
            node.queued = False
            if node.lock_count > 0 or node.children:
                continue
            if last_used == node.last_used:
                return node
            self.add(node)
        return None

    def note_left(self) -> None:
        """A queued node has left the tree: its entry stays, but not for ever."""
        self._num_stale += 1
        if self._num_stale > max(MIN_STALE, len(self._heap) // 2):
            self.purge()

    def purge(self) -> None:
        """Forget every node that has left the tree. O(entries)."""
        self._heap = [entry for entry in self._heap if entry[2].parent is not None]
        heapq.heapify(self._heap)
        self._num_stale = 0

    def clear(self) -> None:
        """Forget every node."""
        self._heap.clear()
        self._num_stale = 0

    def check_integrity(self, nodes: Iterable[RadixNode]) -> None:
        """Verify the entries against all nodes of the tree. O(nodes + entries)."""
        queued = {node: last_used for last_used, _, node in self._heap if node.parent is not None}
        assert len(queued) + self._num_stale == len(self._heap), "a node is in the eviction heap twice, or lost"
        for node in nodes:
            assert node.queued == (node in queued)
            if node.parent is not None and node.lock_count == 0 and not node.children:
                assert node.queued and queued[node] <= node.last_used, "an unlocked leaf can never be evicted"
            queued.pop(node, None)
        assert not queued, "the eviction heap holds nodes that left the tree"
