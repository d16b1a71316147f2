"""Checks of the pages as a whole: each has one owner, each lock and mark its request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hf_accel.kv_cache.allocator import PageAllocator
from hf_accel.kv_cache.holdings import Holding, NextPages
from hf_accel.kv_cache.radix import RadixCache
from hf_accel.kv_cache.radix_node import RadixNode


def check_pages(allocator: PageAllocator, tree: RadixCache, holdings: Sequence[Holding], next_pages: NextPages) -> None:
    """Verify that every page is free, in the tree or a request's own, and that holdings, locks and marks agree. O(pages)."""
    allocator.check_integrity()
    tree.check_integrity()
    next_pages.check_integrity(holdings)
    tree_pages = [page_id for node in tree.nodes() for page_id in node.page_ids]
    own_pages: list[int] = []
    locks: Counter[RadixNode] = Counter()
    for holding in holdings:
        _check_holding(holding, tree.page_size)
        own_pages += holding.page_ids[holding.num_committed :]
        locks.update(holding.node.path())
    owned = set(own_pages).union(tree_pages)
    assert len(owned) == len(own_pages) + len(tree_pages), "a page has two owners"
    free_owned = [page_id for page_id in owned if allocator.is_free(page_id)]
    assert not free_owned, f"free pages with an owner: {free_owned}"
    num_lost = allocator.num_pages - allocator.num_free - len(owned)
    assert num_lost == 0, f"{num_lost} pages lost"
    for node in tree.nodes():
        assert node.lock_count == locks.pop(node, 0), "a lock without a request"
        assert node.page_ids or node.children or node.lock_count, "an empty namespace was kept"
    assert not locks, "a request holds nodes that left the tree"


def _check_holding(holding: Holding, page_size: int) -> None:
    request, path, num_committed = holding.request, holding.node.path(), holding.num_committed
    name = f"request {request.request_id}"
    assert path[0].namespace == request.namespace, f"{name} left its namespace"
    committed = [page_id for node in path for page_id in node.page_ids]
    assert committed == holding.page_ids[:num_committed], f"{name} lost its tree pages"
    keys = [key for node in path for key in node.page_keys]
    assert keys == request.page_keys[: len(keys)], f"{name} holds pages of other tokens"
    assert all(len(key) == page_size for key in keys), f"{name} holds a partial page of the tree"
    start = num_committed * page_size
    known = tuple(request.token_ids[start : start + page_size])
    assert known[: len(holding.next_key)] == holding.next_key, f"{name} computes a page of other tokens"
