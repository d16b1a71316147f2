"""RadixCache: matches, splits, locks, eviction order and cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from hf_accel.kv_cache import radix
from hf_accel.kv_cache.radix import RadixCache
from hf_accel.kv_cache.radix_node import PageKey, RadixNode


def keys(text: str) -> list[PageKey]:
    """One page key for each letter."""
    return [(ord(letter), 7) for letter in text]


def insert(cache: RadixCache, text: str, page_ids: list[int], namespace: str = "") -> RadixNode:
    root, _ = cache.match(namespace, [], 0)
    node, held, _ = cache.insert(root, keys(text), page_ids)
    cache.check_integrity()
    assert held == page_ids
    return node


def match(cache: RadixCache, text: str, limit: int = 99, namespace: str = "") -> list[int]:
    if namespace not in cache:
        return []
    page_ids = cache.match(namespace, keys(text), limit)[1]
    cache.check_integrity()
    return page_ids


def test_match_finds_the_longest_prefix() -> None:
    cache = RadixCache(2)
    insert(cache, "abcd", [0, 1, 2, 3])
    assert match(cache, "abcdef") == [0, 1, 2, 3]
    assert match(cache, "abxd") == [0, 1]
    assert match(cache, "abcd", limit=3) == [0, 1, 2]
    assert match(cache, "abcd", limit=0) == match(cache, "abcd", limit=-1) == match(cache, "xbcd") == []
    assert match(cache, "abcd") == [0, 1, 2, 3]  # after three splits
    assert cache.num_evictable_pages == 4


def test_match_takes_any_sequence_of_keys() -> None:
    cache = RadixCache(2)
    insert(cache, "abcd", [0, 1, 2, 3])
    node, page_ids = cache.match("", tuple(keys("abcx")), 4)
    assert page_ids == [0, 1, 2] and node.page_keys == keys("abc")


def test_match_ends_where_its_node_ends() -> None:
    cache = RadixCache(2)
    insert(cache, "abcd", [0, 1, 2, 3])
    node, _ = cache.match("", keys("ab"), 2)
    assert node.page_ids == [0, 1]
    assert [n.page_ids for n in cache.nodes()] == [[], [0, 1], [2, 3]]


def test_insert_below_a_match_returns_the_pages_that_were_there() -> None:
    cache = RadixCache(2)
    insert(cache, "abcd", [0, 1, 2, 3])
    node, _ = cache.match("", keys("a"), 1)
    end, held, _ = cache.insert(node, keys("bcx"), [11, 12, 13])
    assert held == [1, 2, 13]
    assert [page for n in end.path() for page in n.page_ids] == [0, 1, 2, 13]
    assert cache.insert(node, [], []) == (node, [], [])
    cache.check_integrity()


def test_a_split_keeps_handles_and_locks_true() -> None:
    cache = RadixCache(2)
    node = insert(cache, "abcd", [0, 1, 2, 3])
    cache.lock(node)
    cache.lock(node)
    upper, _ = cache.match("", keys("ab"), 2)
    assert node.page_ids == [2, 3] and node.parent is upper
    assert (upper.lock_count, node.lock_count) == (2, 2)
    cache.lock(upper)
    cache.unlock(node)
    cache.unlock(node)
    assert (cache.num_protected_pages, cache.num_evictable_pages) == (2, 2)
    assert cache.evict(9) == [3, 2]
    cache.unlock(upper)
    cache.check_integrity()
    assert cache.evict(9) == [1, 0]
    assert cache.evict(9) == []


def test_a_lock_moves_down_without_visiting_the_path_above() -> None:
    cache = RadixCache(2)
    first = insert(cache, "ab", [0, 1])
    cache.lock(first)
    second, _, _ = cache.insert(first, keys("cd"), [2, 3])
    cache.lock(second, below=first)
    assert [n.lock_count for n in second.path()] == [1, 1, 1]
    assert cache.num_protected_pages == 4
    cache.unlock(second)
    assert cache.num_evictable_pages == 4
    cache.check_integrity()


def test_an_owned_leaf_grows_in_place() -> None:
    cache = RadixCache(2)
    node = insert(cache, "a", [0])
    cache.lock(node)
    for i, letter in enumerate("bcdefgh", 1):
        assert cache.insert(node, keys(letter), [i], owned=True) == (node, [i], [])
    assert node.page_ids == list(range(8)) and cache.num_protected_pages == 8
    cache.check_integrity()
    cache.unlock(node)
    assert match(cache, "abcdefgh") == list(range(8))


def test_a_shared_or_inner_node_does_not_grow() -> None:
    cache = RadixCache(2)
    node = insert(cache, "a", [0])
    cache.lock(node)
    cache.lock(node)  # somebody else's handle ends here too
    child, _, _ = cache.insert(node, keys("b"), [1], owned=True)
    assert child is not node and node.page_ids == [0]
    cache.unlock(node)
    other, _, _ = cache.insert(node, keys("c"), [2], owned=True)
    assert other is not node and node.page_ids == [0]
    cache.check_integrity()


def test_namespaces_never_mix_and_empty_ones_go() -> None:
    cache = RadixCache(2)
    insert(cache, "ab", [0, 1], namespace="x")
    insert(cache, "ab", [2, 3], namespace="y")
    assert match(cache, "ab", namespace="x") == [0, 1]
    assert match(cache, "ab", namespace="y") == [2, 3]
    assert "z" not in cache
    assert cache.evict(2) == [1, 0]
    assert "x" not in cache and "y" in cache
    root, _ = cache.match("z", keys("a"), 1)
    cache.lock(root)
    assert "z" in cache
    cache.unlock(root)
    assert "z" not in cache
    cache.check_integrity()


def test_clear_namespace_leaves_locked_pages_and_other_namespaces() -> None:
    cache = RadixCache(2)
    insert(cache, "abcd", [0, 1, 2, 3], namespace="x")
    insert(cache, "axy", [6, 4, 5], namespace="y")
    held, _ = cache.match("x", keys("ab"), 2)
    cache.lock(held)
    assert sorted(cache.clear_namespace("x")) == [2, 3]
    cache.check_integrity()
    assert match(cache, "abcd", namespace="x") == [0, 1] and match(cache, "axy", namespace="y") == [6, 4, 5]
    cache.unlock(held)
    assert sorted(cache.clear_namespace("x")) == [0, 1]
    assert "x" not in cache and cache.clear_namespace("x") == []
    cache.check_integrity()
    assert cache.evict(99) == [5, 4, 6]


def test_reset_gives_every_page_back_and_refuses_under_a_lock() -> None:
    cache = RadixCache(2)
    node = insert(cache, "abc", [0, 1, 2])
    insert(cache, "abd", [7, 8, 9], namespace="y")
    cache.lock(node)
    with pytest.raises(AssertionError, match="reset under a lock"):
        cache.reset()
    cache.unlock(node)
    assert sorted(cache.reset()) == [0, 1, 2, 7, 8, 9]
    cache.check_integrity()
    assert "" not in cache and cache.num_evictable_pages == 0 and cache.evict(1) == []


def test_eviction_takes_the_least_recently_used_tail_first() -> None:
    cache = RadixCache(2)
    insert(cache, "ab", [0, 1])
    insert(cache, "cd", [2, 3])
    insert(cache, "ef", [4, 5])
    match(cache, "ab")
    assert cache.evict(1) == [3]
    cache.check_integrity()
    assert cache.evict(2) == [2, 5]
    match(cache, "e")
    assert cache.evict(9) == [1, 0, 4]


def test_a_use_of_a_child_is_a_use_of_its_parents() -> None:
    cache = RadixCache(2)
    parent = insert(cache, "a", [0])
    insert(cache, "b", [1])
    cache.insert(parent, keys("c"), [2])  # visits only what is below `parent`
    assert cache.evict(3) == [1, 2, 0]


def test_unlock_counts_as_a_use() -> None:
    cache = RadixCache(2)
    node = insert(cache, "ab", [0, 1])
    cache.lock(node)
    insert(cache, "cd", [2, 3])
    cache.unlock(node)
    assert cache.evict(4) == [3, 2, 1, 0]


def test_locked_pages_are_never_evicted() -> None:
    cache = RadixCache(2)
    insert(cache, "abcd", [0, 1, 2, 3])
    node, _ = cache.match("", keys("ab"), 2)
    assert cache.count_unlocked(node) == 2
    cache.lock(node)
    assert cache.count_unlocked(node) == 0
    assert cache.evict(9) == [3, 2]
    assert (cache.num_evictable_pages, cache.num_protected_pages) == (0, 2)
    assert match(cache, "abcd") == [0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda node: setattr(node, "lock_count", 1),
        lambda node: node.page_ids.__setitem__(0, 1),
        lambda node: setattr(node, "queued", False),
        lambda node: setattr(node, "last_used", 0),
        lambda node: node.page_keys.__setitem__(0, (0, 0)),
        lambda node: setattr(node, "parent", RadixNode(None, [], [])),
    ],
)
def test_integrity_check_sees_damage(damage: Callable[[RadixNode], Any]) -> None:
    cache = RadixCache(2)
    node = insert(cache, "ab", [0, 1])
    damage(node)
    with pytest.raises(AssertionError):
        cache.check_integrity()


def count_lines(action: Callable[[], Any]) -> int:
    """Source lines of radix.py that `action` executes: a cost that no clock disturbs."""
    num_lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal num_lines
        if frame.f_code.co_filename != radix.__file__:
            return None
        num_lines += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
    return num_lines


def eviction_cost(num_leaves: int) -> int:
    cache = RadixCache(1)
    for i in range(num_leaves):
        root, _ = cache.match(0, [], 0)
        cache.insert(root, [(i,), (i + 1,)], [2 * i, 2 * i + 1])
    return count_lines(lambda: [cache.evict(2) for _ in range(50)])


def test_eviction_costs_the_same_in_a_large_tree() -> None:
    small, large = eviction_cost(100), eviction_cost(10_000)
    assert large == small
    assert large < 50 * 80


def test_a_use_of_every_leaf_costs_eviction_once() -> None:
    cache = RadixCache(1)
    for i in range(1000):
        insert_at, _ = cache.match(0, [], 0)
        cache.insert(insert_at, [(i,)], [i])
    for i in range(1000):
        cache.match(0, [(i,)], 1)
    first = count_lines(lambda: cache.evict(1))  # sets every entry right
    rest = count_lines(lambda: [cache.evict(1) for _ in range(100)])
    assert first < 1000 * 30
    assert rest < 100 * 60


def test_commit_after_a_long_path_costs_only_the_new_pages() -> None:
    def cost(num_nodes: int) -> int:
        cache = RadixCache(1)
        node, _ = cache.match(0, [], 0)
        cache.lock(node)
        for i in range(num_nodes):
            below, (node, _, _) = node, cache.insert(node, [(i,)], [i])
            cache.lock(node, below=below)

        def commit() -> None:
            end, _, _ = cache.insert(node, [(-1,), (-2,)], [num_nodes, num_nodes + 1])
            cache.lock(end, below=node)

        return count_lines(commit)

    assert cost(2) == cost(2000)
