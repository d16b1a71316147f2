"""Partial pages in RadixCache: leaves that are found by their first tokens, replaced by what extends them, never locked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_accel.kv_cache.eviction_queue import MIN_STALE
from hf_accel.kv_cache.radix import RadixCache
from hf_accel.kv_cache.radix_node import PageKey, RadixNode, closest_key, count_common

from .simulation import common


def locked(cache: RadixCache, keys: list[PageKey], page_ids: list[int], namespace: str = "") -> RadixNode:
    """Insert full pages and hold them."""
    root, _ = cache.match(namespace, [], 0)
    node, _, _ = cache.insert(root, keys, page_ids)
    cache.lock(node)
    return node


def tree(*partial: PageKey) -> tuple[RadixCache, RadixNode]:
    """Pages of 4 tokens: (0, 1, 2, 3) is page 0, held, and below it partial ones from page 10 on."""
    cache = RadixCache(4)
    node = locked(cache, [(0, 1, 2, 3)], [0])
    for page_id, key in enumerate(partial, 10):
        assert cache.insert_partial(node, key, page_id) == []
    cache.check_integrity()
    return cache, node


WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@given(keys=st.sets(WORDS), tokens=st.lists(st.integers(0, 2), max_size=4).map(tuple))
def test_the_closest_key_is_a_neighbour(keys: set[PageKey], tokens: PageKey) -> None:
    key, num_common = closest_key(sorted(keys), tokens)
    assert num_common == max((common(k, tokens) for k in keys), default=0)
    assert key in keys or (key, num_common) == ((), 0)
    assert num_common == common(key, tokens) == count_common(key, tokens)


def test_the_longest_common_beginning_is_found_among_full_and_partial_pages() -> None:
    cache, node = tree((5, 6), (7, 8, 9))
    cache.insert(node, [(5, 9, 9, 9), (1, 1, 1, 1)], [20, 21])
    assert cache.longest_common(node, (5, 6, 7, 8)) == (10, 2)
    assert cache.longest_common(node, (5, 9, 9)) == (20, 3)
    assert cache.longest_common(node, (7, 8, 9, 1)) == (11, 3)
    assert cache.longest_common(node, (7,)) == (11, 1)
    assert cache.longest_common(node, (6, 6)) == cache.longest_common(node, ()) == (-1, 0)
    cache.check_integrity()


def test_a_key_that_extends_a_partial_page_takes_its_place() -> None:
    cache, node = tree((5, 6))
    assert cache.insert_partial(node, (5, 6, 7), 11) == [10]
    cache.check_integrity()
    end, held, dropped = cache.insert(node, [(5, 6, 7, 8), (1, 1, 1, 1)], [12, 13])
    assert (held, dropped) == ([12, 13], [11]) and end is not node
    cache.check_integrity()
    assert (cache.num_evictable_pages, cache.num_protected_pages) == (2, 1)
    assert cache.evict(9) == [13, 12]


def test_a_page_that_a_sibling_begins_with_stays_the_callers() -> None:
    cache, node = tree((5, 6, 7))
    assert cache.insert_partial(node, (5, 6), 11) == [11]
    assert cache.insert_partial(node, (5, 6, 7), 11) == [11]
    assert cache.insert(node, [(5, 6, 7, 8)], [12])[2] == [10]
    assert cache.insert_partial(node, (5, 6, 7), 11) == [11]
    assert cache.insert_partial(node, (5, 6, 9), 11) == []
    cache.check_integrity()
    assert node.child_keys == [(5, 6, 7, 8), (5, 6, 9)]


def test_an_owned_leaf_grows_over_the_partial_page_that_it_extends() -> None:
    cache, node = tree((5, 6))
    assert cache.insert(node, [(5, 6, 7, 8)], [1], owned=True) == (node, [1], [10])
    assert node.page_ids == [0, 1] and not node.children
    cache.check_integrity()
    cache.insert_partial(node, (5,), 11)
    end, _, dropped = cache.insert(node, [(6, 6, 6, 6)], [2], owned=True)
    assert end is not node and dropped == []  # another branch
    cache.check_integrity()


def test_partial_pages_go_before_what_they_continue_and_under_its_lock() -> None:
    cache, node = tree((5, 6), (7, 8))
    assert (cache.num_evictable_pages, cache.num_protected_pages) == (2, 1)
    assert cache.longest_common(node, (5, 5)) == (10, 1)
    cache.match("", [], 0)  # time goes on
    cache.longest_common(node, (7, 7))
    cache.match("", [], 0)
    cache.longest_common(node, (5, 5))
    assert cache.evict(1) == [11]  # a use counts
    cache.check_integrity()
    assert cache.evict(9) == [10]
    cache.unlock(node)
    assert cache.evict(9) == [0]
    cache.check_integrity()
    assert "" not in cache


def test_a_split_leaves_partial_pages_where_their_tokens_are() -> None:
    cache = RadixCache(2)
    node = locked(cache, [(0, 0), (1, 1)], [0, 1])
    cache.insert_partial(node, (2,), 10)
    upper, _ = cache.match("", [(0, 0)], 1)
    assert cache.longest_common(upper, (1, 5)) == (1, 1)
    assert cache.longest_common(node, (2, 5)) == (10, 1)
    cache.check_integrity()


def test_clear_and_reset_take_partial_pages_along() -> None:
    cache, node = tree((5, 6), (7, 8))
    other = locked(cache, [(0, 1, 2, 3)], [1], "y")
    cache.insert_partial(other, (5, 6), 20)
    assert sorted(cache.clear_namespace("")) == [10, 11]
    cache.check_integrity()
    assert node.child_keys == [] and other.child_keys == [(5, 6)]
    for held in (node, other):
        cache.unlock(held)
    assert sorted(cache.reset()) == [0, 1, 20]
    cache.check_integrity()


def test_a_partial_page_needs_its_size_and_a_held_parent() -> None:
    cache, node = tree()
    for key in ((), (1, 2, 3, 4)):
        with pytest.raises(AssertionError, match="no partial page"):
            cache.insert_partial(node, key, 9)
    cache.unlock(node)
    with pytest.raises(AssertionError, match="may leave the tree"):
        cache.insert_partial(node, (1,), 9)


def test_what_was_replaced_does_not_pile_up_in_the_eviction_queue() -> None:
    cache = RadixCache(1000)
    root, _ = cache.match("", [], 0)
    cache.lock(root)
    for length in range(1, 999):
        cache.insert_partial(root, tuple(range(length)), length)
        assert len(cache._queue._heap) <= 2 * MIN_STALE
    cache.check_integrity()
    assert cache.evict(9) == [998]
    cache.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda node: node.child_keys.reverse(),
        lambda node: node.child_keys.pop(),
        lambda node: setattr(node.children[5, 6], "lock_count", 1),
        lambda node: node.children[5, 6].page_ids.append(30),
        lambda node: node.page_keys.__setitem__(0, (0, 1, 2)),
        lambda node: RadixNode(node, [(5, 6, 7)], [30]).attach(),
        lambda node: RadixNode(node.children[5, 6], [(1, 1, 1, 1)], [30]).attach(),
    ],
)
def test_integrity_check_sees_damage(damage: Callable[[RadixNode], Any]) -> None:
    cache, node = tree((5, 6), (7, 8))
    damage(node)
    with pytest.raises(AssertionError):
        cache.check_integrity()


def calls(action: Callable[[], Any]) -> int:
    """Python lines that `action` executes."""
    num_lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
    return num_lines


def test_a_look_up_costs_the_same_among_many_children() -> None:
    def cost(num_children: int) -> int:
        cache = RadixCache(4)
        root, _ = cache.match("", [], 0)
        cache.lock(root)
        for i in range(num_children):
            cache.insert_partial(root, (i, i), i)
        middle = num_children // 2
        return calls(lambda: (cache.longest_common(root, (middle, 7)), cache.insert_partial(root, (middle, 7), 10**6)))

    assert cost(10) == cost(10_000) < 100
