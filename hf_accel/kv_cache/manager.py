"""The only door to the KV pages: which request holds which, what is shared, and how room is made.

Owns the free list and the prefix tree. Knows neither tensors nor the order in which requests run. A request's pages are
a head that belongs to the prefix tree (matched, or committed by this request) and a tail of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from hf_accel.kv_cache.allocator import PageAllocator
from hf_accel.kv_cache.radix import PageKey, RadixCache, RadixNode
from hf_accel.request import Request

PageUpdates: TypeAlias = tuple[tuple[int, int], ...]  # (index in the request's page table row, page id)


class PageStats(NamedTuple):
    """Pages of the pool: all, owned by nobody, in the prefix tree."""

    num_total: int
    num_free: int
    num_cached: int


@dataclass(frozen=True)
class PrefixMatch:
    """What the prefix cache has for a waiting request. Good until pages are next allocated.

    Attributes:
        num_tokens: cached tokens, a multiple of the page size.
        in_flight: the next page after them is being computed by a running request: waiting makes it a hit.
        num_unlocked_pages: pages that `admit` will take out of `num_available_pages`.
    """

    num_tokens: int
    in_flight: bool
    num_unlocked_pages: int = 0


@dataclass(eq=False, slots=True)
class _Holding:
    """The pages of one admitted request.

    Attributes:
        request: whose.
        node: where its part of the prefix tree ends; locked once for this request.
        page_ids: its pages in order.
        num_committed: how many of them, from the start, belong to the tree.
        next_page: (node, key) of the page that it computes next, when all tokens of that page are known.
    """

    request: Request
    node: RadixNode
    page_ids: list[int]
    num_committed: int
    next_page: tuple[RadixNode, PageKey] | None = None


class KVCacheManager:
    """Pages of all requests."""

    def __init__(
        self, num_pages: int, page_size: int, enable_prefix_cache: bool = True, force_miss: bool = False
    ) -> None:
        """Start with every page free.

        Args:
            num_pages: pages in the pool.
            page_size: tokens in a page.
            enable_prefix_cache: keep and share the KV of computed pages.
            force_miss: find nothing in the prefix cache (what is computed still goes there).

        Raises:
            ValueError: if a size is not positive.
        """
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self._enable_prefix_cache = enable_prefix_cache
        self._may_hit = enable_prefix_cache and not force_miss
        self._allocator = PageAllocator(num_pages)
        self._tree = RadixCache()
        self._holdings: dict[int, _Holding] = {}
        # A tree position has one node that ends there for as long as someone holds it, so (node, next key) names a page
        # that is being computed, whichever request looks for it.
        self._in_flight: Counter[tuple[RadixNode, PageKey]] = Counter()

    @property
    def num_available_pages(self) -> int:
        """Pages that `allocate` can hand out: the free ones and the evictable ones."""
        return self._allocator.num_free + self._tree.num_evictable_pages

    @property
    def stats(self) -> PageStats:
        """Counts of the pool's pages."""
        num_cached = self._tree.num_evictable_pages + self._tree.num_protected_pages
        return PageStats(self._allocator.num_pages, self._allocator.num_free, num_cached)

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self._allocator.num_pages

    def page_ids(self, request_id: int) -> tuple[int, ...]:
        """The pages of an admitted request, in order."""
        return tuple(self._holdings[request_id].page_ids)

    def match_prefix(self, request: Request) -> PrefixMatch:
        """Look up the longest cached prefix of a waiting request.

        It leaves at least the last token to compute, and every token from `logits_from` on.
        """
        limit_tokens = request.num_tokens - 1
        if request.logits_from is not None:
            limit_tokens = min(limit_tokens, request.logits_from)
        limit_pages = max(0, limit_tokens) // self.page_size
        if not self._may_hit or limit_pages == 0 or request.namespace not in self._tree:
            return PrefixMatch(0, False)
        page_keys = self._page_keys(request, limit_pages)
        node, page_ids = self._tree.match(request.namespace, page_keys, limit_pages)
        num_pages = len(page_ids)
        in_flight = num_pages < limit_pages and (node, page_keys[num_pages]) in self._in_flight
        return PrefixMatch(num_pages * self.page_size, in_flight, self._tree.count_unlocked(node))

    def admit(self, request: Request, match: PrefixMatch) -> PageUpdates:
        """Make the matched pages the head of the request's pages and protect them until `free`.

        Args:
            request: not admitted now.
            match: `match_prefix(request)`, with no page allocated since.

        Returns:
            page-table updates.
        """
        assert request.request_id not in self._holdings, f"request {request.request_id} is admitted already"
        num_pages = match.num_tokens // self.page_size
        node, page_ids = self._tree.match(request.namespace, self._page_keys(request, num_pages), num_pages)
        assert len(page_ids) == num_pages, f"stale match of request {request.request_id}: match again"
        self._tree.lock(node)
        holding = _Holding(request, node, page_ids, num_pages)
        self._holdings[request.request_id] = holding
        self._note_next_page(holding)
        return tuple(enumerate(page_ids))

    def pages_needed(self, request_id: int | None, num_tokens: int) -> int:
        """Pages that the request lacks to hold `num_tokens` tokens (None: a request that holds nothing)."""
        num_held = 0 if request_id is None else len(self._holdings[request_id].page_ids)
        return max(0, -(-num_tokens // self.page_size) - num_held)

    def allocate(self, request_id: int, num_tokens: int) -> PageUpdates | None:
        """Make an admitted request's pages cover `num_tokens` tokens, evicting cached pages where needed.

        Returns:
            page-table updates, or None, with nothing changed, if the pages cannot be had.
        """
        num_new = self.pages_needed(request_id, num_tokens)
        if num_new > self.num_available_pages:
            return None
        if num_new > self._allocator.num_free:
            self._allocator.free(self._tree.evict(num_new - self._allocator.num_free))
        page_ids = self._holdings[request_id].page_ids
        first = len(page_ids)
        page_ids += self._allocator.allocate(num_new)
        return tuple(enumerate(page_ids[first:], first))

    def commit(self, request: Request) -> PageUpdates:
        """Give the request's full computed pages to the prefix tree. Costs O(pages that are new there).

        Returns:
            page-table updates for pages that the tree had already: the request now uses the tree's, its own is freed.
        """
        holding = self._holdings[request.request_id]
        first, last = holding.num_committed, request.num_computed_tokens // self.page_size
        assert request.num_computed_tokens <= request.num_tokens, "computed more tokens than there are"
        assert last <= len(holding.page_ids), "computed more tokens than there are pages for"
        if not self._enable_prefix_cache:
            return ()
        updates: PageUpdates = ()
        if last > first:
            page_keys = self._page_keys(request, last)[first:last]
            own_ids = holding.page_ids[first:last]
            node, tree_ids = self._tree.insert(holding.node, page_keys, own_ids, owned=True)
            self._tree.lock(node, below=holding.node)
            holding.node, holding.num_committed = node, last
            holding.page_ids[first:last] = tree_ids
            updates = tuple((i, new) for i, new, own in zip(range(first, last), tree_ids, own_ids) if new != own)
            self._allocator.free(own_ids[i - first] for i, _ in updates)
        self._note_next_page(holding)
        return updates

    def free(self, request: Request, *, cache: bool = True) -> None:
        """Let go of everything that the request holds: it finished, was aborted or is retracted.

        Args:
            request: an admitted request.
            cache: commit its full computed pages first; otherwise pages not committed yet are lost.

        Raises:
            KeyError: if the request holds nothing.
        """
        if cache:
            self.commit(request)
        holding = self._holdings.pop(request.request_id)
        self._forget_next_page(holding)
        self._tree.unlock(holding.node)
        self._allocator.free(holding.page_ids[holding.num_committed :])

    def clear_namespace(self, namespace: Hashable) -> int:
        """Free the cached pages of a namespace that no request holds.

        Returns:
            how many.
        """
        page_ids = self._tree.clear_namespace(namespace)
        self._allocator.free(page_ids)
        return len(page_ids)

    def reset(self) -> None:
        """Empty the prefix cache.

        Raises:
            RuntimeError: while a request holds pages.
        """
        if self._holdings:
            raise RuntimeError(
                f"cannot flush the KV cache while {len(self._holdings)} request(s) run; abort them first"
            )
        self._allocator.free(self._tree.reset())

    def check_integrity(self) -> None:
        """Verify that every page has one owner, and every lock and in-flight mark its request. O(pages)."""
        self._allocator.check_integrity()
        self._tree.check_integrity()
        tree_pages = [page_id for node in self._tree.nodes() for page_id in node.page_ids]
        own_pages: list[int] = []
        locks: Counter[RadixNode] = Counter()
        in_flight: Counter[tuple[RadixNode, PageKey]] = Counter()
        for request_id, holding in self._holdings.items():
            own_pages += holding.page_ids[holding.num_committed :]
            path = holding.node.path()
            locks.update(path)
            assert holding.request.request_id == request_id
            assert path[0].namespace == holding.request.namespace, f"request {request_id} left its namespace"
            committed = [page_id for node in path for page_id in node.page_ids]
            assert committed == holding.page_ids[: holding.num_committed], f"request {request_id} lost its tree pages"
            keys = [key for node in path for key in node.page_keys]
            assert keys == holding.request.page_keys[: len(keys)], f"request {request_id} holds pages of other tokens"
            if holding.next_page is not None:
                in_flight[holding.next_page] += 1
        owned = set(own_pages).union(tree_pages)
        assert len(owned) == len(own_pages) + len(tree_pages), "a page has two owners"
        free_owned = [page_id for page_id in owned if self._allocator.is_free(page_id)]
        assert not free_owned, f"free pages with an owner: {free_owned}"
        num_lost = (
            self._allocator.num_pages - self.num_available_pages - self._tree.num_protected_pages - len(own_pages)
        )
        assert num_lost == 0, f"{num_lost} pages lost"
        for node in self._tree.nodes():
            assert node.lock_count == locks.pop(node, 0), "a lock without a request"
            assert node.page_ids or node.children or node.lock_count, "an empty namespace was kept"
        assert not locks, "a request holds nodes that left the tree"
        assert in_flight == self._in_flight, "in-flight marks differ from the running requests"

    def check_idle(self) -> None:
        """Verify that nothing is held: every page is free or evictable."""
        self.check_integrity()
        assert not self._holdings, f"requests still hold pages: {sorted(self._holdings)}"
        assert self._tree.num_protected_pages == 0 and not self._in_flight
        assert self.num_available_pages == self._allocator.num_pages

    def _page_keys(self, request: Request, num_pages: int) -> list[PageKey]:
        """The request's key list, filled at least for its first `num_pages` pages."""
        keys, size = request.page_keys, self.page_size
        for start in range(len(keys) * size, num_pages * size, size):
            keys.append(tuple(request.token_ids[start : start + size]))
        return keys

    def _note_next_page(self, holding: _Holding) -> None:
        """Mark the page after the committed ones as being computed, if its tokens are known."""
        index = holding.num_committed
        next_page: tuple[RadixNode, PageKey] | None = None
        if self._enable_prefix_cache and holding.request.num_tokens >= (index + 1) * self.page_size:
            next_page = (holding.node, self._page_keys(holding.request, index + 1)[index])
        if next_page != holding.next_page:
            self._forget_next_page(holding)
            holding.next_page = next_page
            if next_page is not None:
                self._in_flight[next_page] += 1

    def _forget_next_page(self, holding: _Holding) -> None:
        """Take back the mark that the request made, and no other's."""
        if holding.next_page is not None:
            self._in_flight[holding.next_page] -= 1
            if not self._in_flight[holding.next_page]:
                del self._in_flight[holding.next_page]
            holding.next_page = None
