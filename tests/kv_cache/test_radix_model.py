"""RadixCache against a flat dictionary of pages, full and partial, with a scan for the least recently used one.

HF_ACCEL_STRESS_EXAMPLES sets the number of hypothesis runs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hf_accel.kv_cache.radix import RadixCache
from hf_accel.kv_cache.radix_node import PageKey, RadixNode

from .simulation import common

PAGE_SIZE = 3
Position = tuple[int, tuple[PageKey, ...]]  # namespace, keys from the root; the last one may be a partial page's


class FlatCache:
    """What RadixCache must do, page by page: no nodes, no heap, no counters."""

    def __init__(self) -> None:
        self.pages: dict[Position, int] = {}
        self.used: dict[Position, int] = {}
        self.locks: dict[Position, int] = {}
        self.tick = 0

    @staticmethod
    def path(position: Position) -> list[Position]:
        namespace, keys = position
        return [(namespace, keys[: i + 1]) for i in range(len(keys))]

    def touch(self, position: Position) -> None:
        self.tick += 1
        self.used.update(dict.fromkeys(self.path(position), self.tick))

    def match(self, namespace: int, keys: Sequence[PageKey], limit: int) -> tuple[Position, list[int]]:
        length = 0
        while length < min(limit, len(keys)) and (namespace, tuple(keys[: length + 1])) in self.pages:
            length += 1
        end = (namespace, tuple(keys[:length]))
        self.touch(end)
        return end, [self.pages[p] for p in self.path(end)]

    def children(self, parent: Position) -> list[Position]:
        namespace, keys = parent
        return [p for p in self.pages if p[0] == namespace and p[1][:-1] == keys]

    def add(self, position: Position, page_id: int) -> list[int]:
        """Add a page that is not there; pages of siblings that are a part of it go."""
        namespace, keys = position
        parts = [p for p in self.children((namespace, keys[:-1])) if keys[-1][: len(p[1][-1])] == p[1][-1]]
        self.pages[position], self.locks[position] = page_id, 0
        return [self.drop(p) for p in parts]

    def insert(
        self, start: Position, keys: Sequence[PageKey], page_ids: list[int]
    ) -> tuple[Position, list[int], list[int]]:
        end, dropped = (start[0], start[1] + tuple(keys)), list[int]()
        for position, page_id in zip(self.path(end)[len(start[1]) :], page_ids, strict=True):
            if position not in self.pages:
                dropped += self.add(position, page_id)
        if keys:
            self.touch(end)
        return end, [self.pages[p] for p in self.path(end)[len(start[1]) :]], dropped

    def insert_partial(self, parent: Position, key: PageKey, page_id: int) -> list[int]:
        if any(p[1][-1][: len(key)] == key for p in self.children(parent)):
            return [page_id]
        position = (parent[0], (*parent[1], key))
        dropped = self.add(position, page_id)
        self.touch(position)
        return dropped

    def longest_common(self, parent: Position, tokens: PageKey) -> tuple[int, dict[int, Position]]:
        """How many tokens the best children have in common with `tokens`, and those children by page."""
        lengths = {p: common(p[1][-1], tokens) for p in self.children(parent)}
        best = max(lengths.values(), default=0)
        return best, {self.pages[p]: p for p, length in lengths.items() if length == best and best}

    def lock(self, position: Position, change: int) -> None:
        for p in self.path(position):
            self.locks[p] += change
        if change < 0:
            self.touch(position)

    def drop(self, position: Position) -> int:
        del self.used[position], self.locks[position]
        return self.pages.pop(position)

    def evict(self, num_pages: int) -> list[int]:
        evicted: list[int] = []
        while len(evicted) < num_pages:
            inner = {(namespace, keys[:-1]) for namespace, keys in self.pages}
            leaves = [p for p in self.pages if p not in inner and self.locks[p] == 0]
            if not leaves:
                break
            evicted.append(self.drop(min(leaves, key=self.used.__getitem__)))
        return evicted

    def clear_namespace(self, namespace: int) -> list[int]:
        return [self.drop(p) for p in list(self.pages) if p[0] == namespace and self.locks[p] == 0]


FULL_KEYS: list[PageKey] = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0)]
PARTIAL_KEYS: list[PageKey] = [(0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1)]


class Comparison:
    """Both caches, driven together; every answer is compared."""

    def __init__(self) -> None:
        self.real, self.flat = RadixCache(PAGE_SIZE), FlatCache()
        self.handles: list[tuple[RadixNode, Position]] = []  # each locked once
        self.next_page = 0
        self.num_dropped = self.num_partial_hits = 0

    def match(self, namespace: int, keys: list[PageKey], limit: int) -> tuple[RadixNode, Position]:
        node, page_ids = self.real.match(namespace, keys, limit)
        end, expected = self.flat.match(namespace, keys, limit)
        assert page_ids == expected
        path = node.path()
        assert [p for n in path for p in n.page_ids] == expected and path[0].namespace == namespace
        locked = sum(self.flat.locks[p] > 0 for p in self.flat.path(end))
        assert self.real.count_unlocked(node) == len(expected) - locked
        return node, end

    def insert(
        self, node: RadixNode, start: Position, keys: list[PageKey], owned: bool = False
    ) -> tuple[RadixNode, Position]:
        page_ids = list(range(self.next_page, self.next_page + len(keys)))
        self.next_page += len(keys)
        end_node, held, dropped = self.real.insert(node, keys, page_ids, owned=owned)
        end, expected, expected_dropped = self.flat.insert(start, keys, page_ids)
        assert (held, dropped) == (expected, expected_dropped)
        self.num_dropped += len(dropped)
        return end_node, end

    def insert_partial(self, index: int, key: PageKey) -> None:
        node, position = self.handles[index % len(self.handles)]
        dropped = self.real.insert_partial(node, key, self.next_page)
        assert dropped == self.flat.insert_partial(position, key, self.next_page)
        self.num_dropped += dropped not in ([], [self.next_page])
        self.next_page += 1

    def match_longest(self, namespace: int, keys: list[PageKey], limit: int, tokens: PageKey) -> None:
        node, position = self.match(namespace, keys, limit)
        page_id, num_common = self.real.longest_common(node, tokens)
        expected, candidates = self.flat.longest_common(position, tokens)
        assert num_common == expected
        if not expected:
            assert page_id == -1
            return
        child = candidates[page_id]
        if len(child[1][-1]) < PAGE_SIZE:
            self.flat.used[child] = self.flat.tick
            self.num_partial_hits += 1

    def match_and_insert(self, namespace: int, keys: list[PageKey], limit: int) -> None:
        node, end = self.match(namespace, keys, limit)
        self.insert(node, end, keys[len(end[1]) :] or [FULL_KEYS[0]])

    def match_and_lock(self, namespace: int, keys: list[PageKey], limit: int) -> None:
        node, end = self.match(namespace, keys, limit)
        self.real.lock(node)
        self.flat.lock(end, 1)
        self.handles.append((node, end))

    def extend_handle(self, index: int, keys: list[PageKey], owned: bool) -> None:
        node, start = self.handles[index % len(self.handles)]
        end_node, end = self.insert(node, start, keys, owned)
        self.real.lock(end_node, below=node)
        for position in self.flat.path(end)[len(start[1]) :]:
            self.flat.locks[position] += 1
        self.handles[index % len(self.handles)] = (end_node, end)

    def unlock(self, index: int) -> None:
        node, end = self.handles.pop(index % len(self.handles))
        self.real.unlock(node)
        self.flat.lock(end, -1)

    def evict(self, num_pages: int) -> None:
        assert self.real.evict(num_pages) == self.flat.evict(num_pages)

    def clear_namespace(self, namespace: int) -> None:
        assert sorted(self.real.clear_namespace(namespace)) == sorted(self.flat.clear_namespace(namespace))

    def check(self) -> None:
        self.real.check_integrity()
        num_locked = sum(count > 0 for count in self.flat.locks.values())
        assert self.real.num_protected_pages == num_locked
        assert self.real.num_evictable_pages == len(self.flat.pages) - num_locked
        for node, (namespace, keys) in self.handles:
            path = node.path()
            assert path[0].namespace == namespace and tuple(k for n in path for k in n.page_keys) == keys


NAMESPACE = st.integers(0, 1)
KEYS = st.lists(st.sampled_from(FULL_KEYS), max_size=6)
PARTIAL = st.sampled_from(PARTIAL_KEYS)
TOKENS = st.lists(st.integers(0, 1), max_size=PAGE_SIZE).map(tuple)
LIMIT = st.integers(0, 7)
INDEX = st.integers(0, 100)


class RadixMachine(RuleBasedStateMachine):
    """Any order of operations, integrity checked after each."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Comparison()

    @rule(namespace=NAMESPACE, keys=KEYS, limit=LIMIT)
    def match(self, namespace: int, keys: list[PageKey], limit: int) -> None:
        self.both.match(namespace, keys, limit)

    @rule(namespace=NAMESPACE, keys=KEYS, limit=LIMIT, tokens=TOKENS)
    def match_longest(self, namespace: int, keys: list[PageKey], limit: int, tokens: PageKey) -> None:
        self.both.match_longest(namespace, keys, limit, tokens)

    @precondition(lambda self: self.both.handles)
    @rule(index=INDEX, key=PARTIAL)
    def insert_partial(self, index: int, key: PageKey) -> None:
        self.both.insert_partial(index, key)

    @rule(namespace=NAMESPACE, keys=KEYS, limit=LIMIT)
    def insert(self, namespace: int, keys: list[PageKey], limit: int) -> None:
        self.both.match_and_insert(namespace, keys, limit)

    @rule(namespace=NAMESPACE, keys=KEYS, limit=LIMIT)
    def lock(self, namespace: int, keys: list[PageKey], limit: int) -> None:
        self.both.match_and_lock(namespace, keys, limit)

    @precondition(lambda self: self.both.handles)
    @rule(index=INDEX, keys=KEYS, owned=st.booleans())
    def extend(self, index: int, keys: list[PageKey], owned: bool) -> None:
        self.both.extend_handle(index, keys, owned)

    @precondition(lambda self: self.both.handles)
    @rule(index=INDEX)
    def unlock(self, index: int) -> None:
        self.both.unlock(index)

    @rule(num_pages=st.integers(0, 8))
    def evict(self, num_pages: int) -> None:
        self.both.evict(num_pages)

    @rule(namespace=NAMESPACE)
    def clear(self, namespace: int) -> None:
        self.both.clear_namespace(namespace)

    @invariant()
    def holds(self) -> None:
        self.both.check()

    def teardown(self) -> None:
        while self.both.handles:
            self.both.unlock(0)
        self.both.check()
        self.both.evict(10**6)
        assert all(node.parent is None for node in self.both.real.nodes()), "pages left"
        self.both.check()


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(
    max_examples=int(os.environ.get("HF_ACCEL_STRESS_EXAMPLES", "80")), stateful_step_count=40, deadline=None
)


def test_long_random_run() -> None:
    rng = random.Random(7)
    both = Comparison()
    for step in range(5_000):
        namespace, keys = rng.randrange(3), rng.choices(FULL_KEYS[1:3], k=rng.randrange(12))
        choice = rng.random()
        if choice < 0.1:
            both.match(namespace, keys, rng.randrange(13))
        elif choice < 0.2:
            both.match_longest(namespace, keys, rng.randrange(13), rng.choice(FULL_KEYS + PARTIAL_KEYS))
        elif choice < 0.35 and both.handles:
            both.insert_partial(rng.randrange(6), rng.choice(PARTIAL_KEYS))
        elif choice < 0.45:
            both.match_and_insert(namespace, keys, rng.randrange(13))
        elif choice < 0.6 and len(both.handles) < 6:
            both.match_and_lock(namespace, keys, rng.randrange(13))
        elif choice < 0.75 and both.handles:
            both.extend_handle(rng.randrange(6), keys[:4], rng.random() < 0.7)
        elif choice < 0.85 and both.handles:
            both.unlock(rng.randrange(6))
        elif choice < 0.999:
            both.evict(max(0, both.real.num_evictable_pages - rng.randrange(30)))
        else:
            both.clear_namespace(namespace)
        if step % 10 == 0:
            both.check()
    assert both.num_dropped > 10 and both.num_partial_hits > 10
