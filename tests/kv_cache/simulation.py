"""A pool whose pages remember whose KV they hold, and a model of what KVCacheManager must answer.

Every match, page update, count and in-flight answer is predicted by dictionaries keyed by chained token hashes. Copies of
pages are replayed in order before the next computation, as an engine's step does, so that a wrong source or a wrong order
shows in the contents.
"""

from __future__ import annotations

from collections import Counter

from hf_accel.kv_cache.manager import MIN_TOKENS_WORTH_WAITING, KVCacheManager
from hf_accel.kv_cache.prefix_match import PrefixMatch
from hf_accel.request import Request
from hf_accel.sampling_params import SamplingParams

PARAMS = SamplingParams()
Tokens = tuple[int, ...]


class Simulation:
    """A manager, its pool's contents, and a model of what must be cached."""

    def __init__(self, num_pages: int, page_size: int, enabled: bool = True, force_miss: bool = False) -> None:
        self.manager = KVCacheManager(num_pages, page_size, enabled, force_miss)
        self.num_pages, self.page_size, self.enabled = num_pages, page_size, enabled
        self.may_hit = enabled and not force_miss
        self.pool: list[list[int]] = [[0] * page_size for _ in range(num_pages)]  # a hash of the whole prefix per slot
        self.copies: list[tuple[int, int]] = []  # not made yet
        self.cached: dict[int, dict[Tokens, int]] = {}  # hash before a page -> its tokens, fewer if partial -> the page
        self.place: dict[int, tuple[int, Tokens]] = {}  # cached page -> where it is in `cached`
        self.hashes: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.committed: dict[int, int] = {}
        self.next_page: dict[int, tuple[int, Tokens]] = {}  # hash before the page computed next, its tokens known then
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_ids = 0
        self.events: Counter[str] = Counter()

    def chain(self, request: Request) -> list[int]:
        """Hash of the namespace and every token up to each position."""
        hashes = self.hashes.setdefault(request.request_id, [])
        for token in request.token_ids[len(hashes) :]:
            hashes.append(hash((hashes[-1] if hashes else hash(("root", request.namespace)), token)))
        return hashes

    def hash_before(self, request: Request, index: int) -> int:
        """Hash of all that comes before page `index`."""
        return self.chain(request)[index * self.page_size - 1] if index else hash(("root", request.namespace))

    def page(self, request: Request, index: int, stop: int | None = None) -> Tokens:
        """The tokens of page `index` that are known (or come before position `stop`)."""
        start = index * self.page_size
        end = request.num_tokens if stop is None else stop
        return tuple(request.token_ids[start : min(start + self.page_size, end)])

    def find(self, before: int, tokens: Tokens) -> int | None:
        return self.cached.get(before, {}).get(tokens)

    def add(self, token_ids: list[int], namespace: int = 0, logits_from: int | None = None) -> Request:
        request = Request(self.num_ids, list(token_ids), len(token_ids), PARAMS, namespace, logits_from=logits_from)
        self.num_ids += 1
        self.waiting.append(request)
        return request

    def check_match(self, request: Request, match: PrefixMatch) -> int:
        """Compare a match with what is cached and computed; returns the whole pages of it."""
        limit = min(request.num_tokens - 1, 10**9 if request.logits_from is None else request.logits_from)
        num_pages = 0
        while self.may_hit and (num_pages + 1) * self.page_size <= limit:
            if self.find(self.hash_before(request, num_pages), self.page(request, num_pages)) is None:
                break
            num_pages += 1
        start = num_pages * self.page_size
        assert match.num_shared_tokens == start
        if not self.may_hit or limit <= start:
            assert match == PrefixMatch(start, False, match.num_unlocked_pages)
            return num_pages
        before, tokens = self.hash_before(request, num_pages), self.page(request, num_pages, limit)
        in_tree = max((common(tokens, key) for key in self.cached.get(before, {})), default=0)
        live = {
            r: common(tokens, self.next_page[r.request_id][1])
            for r in self.running
            if self.next_page[r.request_id][0] == before
        }
        num_known = max(live.values(), default=0)
        best = [r for r in live if live[r] == num_known > 0]  # the manager chooses one of these
        answers = {self.answer(request, start, limit, in_tree, num_known, r) for r in best} or {(in_tree, False)}
        if match.num_unlocked_pages < self.manager.num_available_pages:
            assert (match.num_tokens - start, match.in_flight) in answers
        else:
            assert not match.tail and match.in_flight in {in_flight for _, in_flight in answers}
            self.events["no page for a tail"] += max(answers) > (0, True)
        self.check_tail(request, start, match)
        return num_pages

    def answer(
        self, request: Request, start: int, limit: int, in_tree: int, num_known: int, other: Request
    ) -> tuple[int, bool]:
        """Tokens of a tail, and whether more are in flight, if `other` is the running request that is looked at."""
        ready = max(in_tree, min(num_known, other.num_computed_tokens - start))
        first, stop = start + ready, start + ready + MIN_TOKENS_WORTH_WAITING
        agree = stop <= limit and other.token_ids[first:stop] == request.token_ids[first:stop]
        return ready, ready < num_known and agree

    def check_tail(self, request: Request, start: int, match: PrefixMatch) -> None:
        """The source holds the tokens, as soon as the copies before it are made."""
        if match.tail is not None:
            page_id, num_tokens = match.tail
            assert self.contents()[page_id][:num_tokens] == self.chain(request)[start : start + num_tokens]
            self.events["tail of the tree" if page_id in self.place else "tail of a request"] += 1

    def contents(self) -> list[list[int]]:
        """The pool as it will be when the copies that wait are made."""
        if not self.copies:
            return self.pool
        pool = list(self.pool)
        for source, destination in self.copies:
            pool[destination] = list(pool[source])
        return pool

    def admit(self, request: Request) -> None:
        match = self.manager.match_prefix(request)
        num_pages = self.check_match(request, match)
        before, free = self.manager.num_available_pages, self.manager.stats.num_free
        to_admit = self.manager.pages_to_admit(request, match)
        updates = self.manager.admit(request, match)
        lacking = self.manager.pages_needed(request.request_id, request.num_tokens)
        assert to_admit == before - self.manager.num_available_pages + lacking
        assert self.manager.num_available_pages == before - match.num_unlocked_pages - bool(match.tail)
        shared = [self.find(self.hash_before(request, i), self.page(request, i)) for i in range(num_pages)]
        assert updates[:num_pages] == tuple(enumerate(shared)) and len(updates) == num_pages + bool(match.tail)
        if match.tail:
            [(index, page_id)] = updates[num_pages:]
            assert index == num_pages
            self.take([page_id], free)
            copies = self.manager.take_page_copies()
            assert copies == (((match.tail.source_page, page_id),) if page_id != match.tail.source_page else ())
            self.events["taken over"] += not copies
            used = {page for copy in self.copies for page in copy}
            self.events["order matters"] += page_id in used or match.tail.source_page in {d for _, d in self.copies}
            self.copies += copies
        request.num_computed_tokens = match.num_tokens
        self.tables[request.request_id] = [page_id for _, page_id in updates]
        self.committed[request.request_id] = num_pages
        self.note_next_page(request)
        self.waiting.remove(request)
        self.running.append(request)
        self.check_pool(request)
        self.events["hit" if num_pages else "miss"] += 1
        self.events["in flight"] += match.in_flight

    def note_next_page(self, request: Request) -> None:
        index = self.committed[request.request_id]
        self.next_page[request.request_id] = (self.hash_before(request, index), self.page(request, index))

    def take(self, page_ids: list[int], num_free: int) -> None:
        """Pages were handed out: cached ones among them are evicted."""
        evicted = [page_id for page_id in page_ids if page_id in self.place]
        assert len(evicted) == max(0, len(page_ids) - num_free), "evicted more than needed, or handed out a page in use"
        places = [self.forget(page_id) for page_id in evicted]
        for before, tokens in places:
            assert hash_after(before, tokens) not in self.cached, "evicted a page before its children"
        self.events["evicted"] += len(evicted)

    def compute(self, request: Request, num_tokens: int) -> bool:
        """Run `num_tokens` known tokens through the simulated model; False if pages ran out."""
        rid, table = request.request_id, self.tables[request.request_id]
        end = min(request.num_computed_tokens + num_tokens, request.num_tokens)
        needed = max(0, -(-end // self.page_size) - len(table))
        available, num_free = self.manager.num_available_pages, self.manager.stats.num_free
        assert self.manager.pages_needed(rid, end) == needed
        updates = self.manager.allocate(rid, end)
        if needed > available:
            assert updates is None and self.manager.num_available_pages == available
            self.events["out of pages"] += 1
            return False
        assert updates is not None and [i for i, _ in updates] == list(range(len(table), len(table) + needed))
        table += [page_id for _, page_id in updates]
        self.take([page_id for _, page_id in updates], num_free)
        self.pool, self.copies = self.contents(), []
        hashes = self.chain(request)
        for position in range(request.num_computed_tokens, end):
            self.pool[table[position // self.page_size]][position % self.page_size] = hashes[position]
        request.num_computed_tokens = end
        return True

    def forget(self, page_id: int) -> tuple[int, Tokens]:
        before, tokens = self.place.pop(page_id)
        del self.cached[before][tokens]
        if not self.cached[before]:
            del self.cached[before]
        return before, tokens

    def keep(self, before: int, tokens: Tokens, page_id: int) -> None:
        """A page goes to the tree; a partial one that it extends leaves it."""
        for key, part in list(self.cached.get(before, {}).items()):
            if tokens[: len(key)] == key:
                self.forget(part)
                self.events["extended"] += 1
        self.cached.setdefault(before, {})[tokens] = page_id
        self.place[page_id] = before, tokens

    def expect_commit(self, request: Request) -> tuple[tuple[int, int], ...]:
        rid, table = request.request_id, self.tables[request.request_id]
        updates = []
        if self.enabled:
            for index in range(self.committed[rid], request.num_computed_tokens // self.page_size):
                before, tokens = self.hash_before(request, index), self.page(request, index)
                page_id = self.find(before, tokens)
                if page_id is None:
                    self.keep(before, tokens, table[index])
                elif page_id != table[index]:
                    updates.append((index, page_id))
                    table[index] = page_id
                    self.events["duplicate"] += 1
                self.committed[rid] = index + 1
            self.note_next_page(request)
        return tuple(updates)

    def expect_partial(self, request: Request) -> None:
        index = self.committed[request.request_id]
        tokens = self.page(request, index, request.num_computed_tokens)
        before = self.hash_before(request, index)
        if tokens and self.enabled:
            held = any(key[: len(tokens)] == tokens for key in self.cached.get(before, {}))
            if not held:
                self.keep(before, tokens, self.tables[request.request_id][index])
            self.events["partial held" if held else "partial kept"] += 1

    def commit(self, request: Request) -> None:
        assert self.manager.commit(request) == self.expect_commit(request)
        self.check_pool(request)

    def free(self, request: Request, cache: bool, retract: bool) -> None:
        self.check_pool(request)
        if cache:
            self.expect_commit(request)
            self.expect_partial(request)
        self.manager.free(request, cache=cache)
        self.running.remove(request)
        for facts in (self.tables, self.committed, self.next_page):
            del facts[request.request_id]
        request.num_computed_tokens = 0
        if retract:
            self.waiting.append(request)
        else:
            del self.hashes[request.request_id]
        self.check_counts()

    def clear_namespace(self, namespace: int) -> None:
        locked = {self.tables[r.request_id][i] for r in self.running for i in range(self.committed[r.request_id])}
        gone = {p for p in set(self.place) - locked if self.in_namespace(p, namespace)}
        assert self.manager.clear_namespace(namespace) == len(gone)
        for page_id in gone:
            self.forget(page_id)
        self.check_counts()

    def in_namespace(self, page_id: int, namespace: int) -> bool:
        ends = {hash_after(before, tokens): before for before, tokens in self.place.values()}
        before = self.place[page_id][0]
        while before in ends:
            before = ends[before]
        return before == hash(("root", namespace))

    def check_pool(self, request: Request) -> None:
        """Every computed token's KV is still where the request's page table says."""
        hashes, table, size = self.chain(request), self.tables[request.request_id], self.page_size
        pool = self.contents()
        for i in range(0, request.num_computed_tokens, size):
            known = hashes[i : min(i + size, request.num_computed_tokens)]
            assert pool[table[i // size]][: len(known)] == known, f"request {request.request_id}, page {i // size}"

    def check_counts(self) -> None:
        own = sum(len(self.tables[r.request_id]) - self.committed[r.request_id] for r in self.running)
        stats = self.manager.stats
        assert stats == (self.num_pages, self.num_pages - len(self.place) - own, len(self.place))

    def check(self) -> None:
        self.manager.check_integrity()
        self.check_counts()
        locked = {self.tables[r.request_id][i] for r in self.running for i in range(self.committed[r.request_id])}
        assert self.manager.num_available_pages == self.manager.stats.num_free + len(self.place) - len(locked)
        for request in self.running:
            self.check_pool(request)

    def finish(self) -> None:
        """End everything; nothing may stay behind."""
        for request in list(self.running):
            self.free(request, cache=True, retract=False)
        self.manager.check_idle()
        self.manager.reset()
        assert self.manager.stats == (self.num_pages, self.num_pages, 0)
        self.manager.check_idle()


def common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix, token by token."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def hash_after(before: int, tokens: Tokens) -> int:
    for token in tokens:
        before = hash((before, token))
    return before
