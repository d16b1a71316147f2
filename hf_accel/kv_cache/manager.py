"""The only door to the KV pages: which request holds which, what is shared, and how room is made.

Owns the free list and the prefix tree. Knows neither tensors nor the order in which requests run. A request's pages are
a head that belongs to the prefix tree (matched, or committed by this request) and a tail of its own. Whole pages are
shared; of the page after them a request gets a copy as far as its tokens agree, from the tree or from a running request.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, TypeAlias

from hf_accel.kv_cache.allocator import PageAllocator
from hf_accel.kv_cache.holdings import Holding, NextPages
from hf_accel.kv_cache.integrity import check_pages
from hf_accel.kv_cache.prefix_match import PageTail, PrefixMatch
from hf_accel.kv_cache.radix import RadixCache
from hf_accel.kv_cache.radix_node import PageKey, RadixNode
from hf_accel.request import Request

PageUpdates: TypeAlias = tuple[tuple[int, int], ...]  # (index in the request's page table row, page id)
PageCopies: TypeAlias = tuple[tuple[int, int], ...]  # (source page, destination page), one after the other

MIN_TOKENS_WORTH_WAITING = 4
"""A waiting request waits another step only for so many tokens that a running one is about to compute."""


class PageStats(NamedTuple):
    """Pages of the pool: all, owned by nobody, in the prefix tree."""

    num_total: int
    num_free: int
    num_cached: int


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
        self._tree = RadixCache(page_size)
        self._holdings: dict[int, Holding] = {}
        self._next_pages = NextPages()
        self._page_copies: list[tuple[int, int]] = []

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
        limit = request.num_tokens - 1
        if request.logits_from is not None:
            limit = min(limit, request.logits_from)
        if not self._may_hit or limit <= 0 or request.namespace not in self._tree:
            return PrefixMatch(0, False)
        limit_pages = limit // self.page_size
        node, page_ids = self._tree.match(request.namespace, self._page_keys(request, limit_pages), limit_pages)
        num_shared = len(page_ids) * self.page_size
        tail, in_flight = self._match_tail(request, node, num_shared, limit)
        num_unlocked = self._tree.count_unlocked(node)
        if tail is None or num_unlocked >= self.num_available_pages:  # no page to copy it to
            return PrefixMatch(num_shared, in_flight, num_unlocked)
        return PrefixMatch(num_shared + tail.num_tokens, in_flight, num_unlocked, tail)

    def _match_tail(self, request: Request, node: RadixNode, start: int, limit: int) -> tuple[PageTail | None, bool]:
        """The longest run of the request's tokens [start, limit) that the pages below `node` begin with, and whether
        waiting makes it longer."""
        token_ids = request.token_ids
        tokens = tuple(token_ids[start : min(limit, start + self.page_size)])
        page_id, num_ready = self._tree.longest_common(node, tokens)
        holding, num_known = self._next_pages.longest_common(node, tokens)
        if holding is not None:
            num_live = min(num_known, holding.request.num_computed_tokens - start)
            if num_live > num_ready:
                page_id, num_ready = holding.page_ids[holding.num_committed], num_live
        tail = PageTail(page_id, num_ready) if num_ready else None
        if holding is None or num_known <= num_ready:
            return tail, False
        first = start + num_ready
        stop = min(first + MIN_TOKENS_WORTH_WAITING, limit)
        worth = stop - first == MIN_TOKENS_WORTH_WAITING
        return tail, worth and holding.request.token_ids[first:stop] == token_ids[first:stop]

    def admit(self, request: Request, match: PrefixMatch) -> PageUpdates:
        """Make the matched pages the head of the request's pages and protect them until `free`.

        A tail becomes a page of the request's own, whose copy is among the next `take_page_copies`.

        Args:
            request: not admitted now.
            match: `match_prefix(request)`, with no page allocated since.

        Returns:
            page-table updates.
        """
        assert request.request_id not in self._holdings, f"request {request.request_id} is admitted already"
        num_pages = match.num_shared_tokens // self.page_size
        node, page_ids = self._tree.match(request.namespace, self._page_keys(request, num_pages), num_pages)
        assert len(page_ids) == num_pages, f"stale match of request {request.request_id}: match again"
        self._tree.lock(node)
        if match.tail is not None:
            assert not self._allocator.is_free(match.tail.source_page), "stale match: its tail is gone"
            [page_id] = self._take_pages(1)
            page_ids.append(page_id)
            if page_id != match.tail.source_page:  # it is if the source was evicted just now
                self._page_copies.append((match.tail.source_page, page_id))
        holding = Holding(request, node, page_ids, num_pages)
        self._holdings[request.request_id] = holding
        self._note_next_page(holding)
        return tuple(enumerate(page_ids))

    def take_page_copies(self) -> PageCopies:
        """Hand over the copies that admissions since the last call need, in order.

        They must be made before the next forward: a source may be free by now, or the destination of a later copy.
        """
        copies = tuple(self._page_copies)
        self._page_copies.clear()
        return copies

    def pages_to_admit(self, request: Request, match: PrefixMatch) -> int:
        """Available pages that it takes to admit a waiting request and compute all its known tokens."""
        num_shared = match.num_shared_tokens // self.page_size
        return self.pages_needed(None, request.num_tokens) - num_shared + match.num_unlocked_pages

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
        page_ids = self._holdings[request_id].page_ids
        first = len(page_ids)
        page_ids += self._take_pages(num_new)
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
        self._forget_next_page(holding)
        if last > first:
            page_keys = self._page_keys(request, last)[first:last]
            own_ids = holding.page_ids[first:last]
            node, tree_ids, dropped = self._tree.insert(holding.node, page_keys, own_ids, owned=True)
            self._tree.lock(node, below=holding.node)
            holding.node, holding.num_committed = node, last
            holding.page_ids[first:last] = tree_ids
            updates = tuple((i, new) for i, new, own in zip(range(first, last), tree_ids, own_ids) if new != own)
            self._allocator.free([*dropped, *(own_ids[i - first] for i, _ in updates)])
        self._note_next_page(holding)
        return updates

    def free(self, request: Request, *, cache: bool = True) -> None:
        """Let go of everything that the request holds: it finished, was aborted or is retracted.

        Args:
            request: an admitted request.
            cache: commit its full computed pages first, and leave the partial page after them to the tree; otherwise
                pages not committed yet are lost.

        Raises:
            KeyError: if the request holds nothing.
        """
        if cache:
            self.commit(request)
        holding = self._holdings.pop(request.request_id)
        self._forget_next_page(holding)
        own_ids = holding.page_ids[holding.num_committed :]
        start = holding.num_committed * self.page_size
        if cache and self._enable_prefix_cache and request.num_computed_tokens > start:
            key = tuple(request.token_ids[start : request.num_computed_tokens])
            own_ids = self._tree.insert_partial(holding.node, key, own_ids[0]) + own_ids[1:]
        self._tree.unlock(holding.node)
        self._allocator.free(own_ids)

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
        self._page_copies.clear()

    def check_integrity(self) -> None:
        """Verify that every page has one owner, and every lock and in-flight mark its request. O(pages)."""
        assert all(request_id == h.request.request_id for request_id, h in self._holdings.items())
        check_pages(self._allocator, self._tree, list(self._holdings.values()), self._next_pages)

    def check_idle(self) -> None:
        """Verify that nothing is held: every page is free or evictable."""
        self.check_integrity()
        assert not self._holdings, f"requests still hold pages: {sorted(self._holdings)}"
        assert self._tree.num_protected_pages == 0
        assert self.num_available_pages == self._allocator.num_pages

    def _page_keys(self, request: Request, num_pages: int) -> list[PageKey]:
        """The request's key list, filled at least for its first `num_pages` pages."""
        keys, size = request.page_keys, self.page_size
        for start in range(len(keys) * size, num_pages * size, size):
            keys.append(tuple(request.token_ids[start : start + size]))
        return keys

    def _take_pages(self, num_pages: int) -> list[int]:
        """Take pages that `num_available_pages` has, evicting cached ones where needed."""
        if num_pages > self._allocator.num_free:
            self._allocator.free(self._tree.evict(num_pages - self._allocator.num_free))
        return self._allocator.allocate(num_pages)

    def _note_next_page(self, holding: Holding) -> None:
        """Enter the request's known tokens in the page after the committed ones."""
        start = holding.num_committed * self.page_size
        if self._enable_prefix_cache:
            holding.next_key = tuple(holding.request.token_ids[start : start + self.page_size])
        if holding.next_key:
            self._next_pages.add(holding)

    def _forget_next_page(self, holding: Holding) -> None:
        """Take back the entry that the request made."""
        if holding.next_key:
            self._next_pages.remove(holding)
            holding.next_key = ()
