"""KVCacheManager driven like a scheduler would, on a simulated pool whose pages remember whose KV they hold.

Every match, page update, count and in-flight answer is predicted by dictionaries keyed by chained token hashes.
HF_ACCEL_STRESS_OPS sets the length of the plain random run.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_accel.kv_cache.manager import KVCacheManager
from hf_accel.request import Request
from hf_accel.sampling_params import SamplingParams

PARAMS = SamplingParams()


class Simulation:
    """A manager, its pool's contents, and a model of what must be cached."""

    def __init__(self, num_pages: int, page_size: int, enabled: bool = True, force_miss: bool = False) -> None:
        self.manager = KVCacheManager(num_pages, page_size, enabled, force_miss)
        self.num_pages, self.page_size, self.enabled = num_pages, page_size, enabled
        self.may_hit = enabled and not force_miss
        self.pool: list[list[int]] = [[0] * page_size for _ in range(num_pages)]  # a hash of the whole prefix per slot
        self.cached: dict[int, int] = {}  # hash at the end of a full page -> its page
        self.cached_hash: dict[int, int] = {}  # and back
        self.num_children: Counter[int] = Counter()  # cached pages that continue a cached page
        self.parent: dict[int, int] = {}
        self.hashes: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.committed: dict[int, int] = {}
        self.next_page: dict[int, int | None] = {}  # hash of the page computed next, as known at the last commit
        self.last_key: dict[int, int] = {}  # what an evicted page held
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_ids = 0
        self.events: Counter[str] = Counter()

    def chain(self, request: Request) -> list[int]:
        """Hash of the namespace and every token up to each position."""
        hashes = self.hashes.setdefault(request.request_id, [])
        for token in request.token_ids[len(hashes) :]:
            hashes.append(hash((hashes[-1] if hashes else request.namespace, token)))
        return hashes

    def page_hash(self, request: Request, index: int) -> int | None:
        """Hash at the end of page `index`, None if not all its tokens are known; the namespace's before page 0."""
        if index < 0:
            return hash(("root", request.namespace))
        hashes, end = self.chain(request), (index + 1) * self.page_size
        return hashes[end - 1] if end <= len(hashes) else None

    def add(self, token_ids: list[int], namespace: int = 0, logits_from: int | None = None) -> Request:
        request = Request(self.num_ids, list(token_ids), len(token_ids), PARAMS, namespace, logits_from=logits_from)
        self.num_ids += 1
        self.waiting.append(request)
        return request

    def expected_match(self, request: Request) -> tuple[int, bool]:
        limit = min(request.num_tokens - 1, 10**9 if request.logits_from is None else request.logits_from)
        limit_pages = limit // self.page_size if self.may_hit else 0
        num_pages = 0
        while num_pages < limit_pages and self.page_hash(request, num_pages) in self.cached:
            num_pages += 1
        in_flight = num_pages < limit_pages and self.page_hash(request, num_pages) in self.next_page.values()
        return num_pages, in_flight

    def admit(self, request: Request) -> None:
        match = self.manager.match_prefix(request)
        num_pages, in_flight = self.expected_match(request)
        assert (match.num_tokens, match.in_flight) == (num_pages * self.page_size, in_flight)
        before = self.manager.num_available_pages
        updates = self.manager.admit(request, match)
        assert self.manager.num_available_pages == before - match.num_unlocked_pages
        assert updates == tuple((i, self.cached[self.page_hash(request, i)]) for i in range(num_pages))
        request.num_computed_tokens = match.num_tokens
        self.tables[request.request_id] = [page_id for _, page_id in updates]
        self.committed[request.request_id] = num_pages
        self.next_page[request.request_id] = self.page_hash(request, num_pages) if self.enabled else None
        self.waiting.remove(request)
        self.running.append(request)
        self.check_pool(request)
        self.events["hit" if num_pages else "miss"] += 1
        self.events["in flight"] += in_flight

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
        evicted = [page_id for _, page_id in updates if page_id in self.cached_hash]
        assert len(evicted) == max(0, needed - num_free), "evicted more than needed, or handed out a page in use"
        for page_id in evicted:
            self.forget(page_id)
        assert not any(self.num_children[self.last_key[p]] for p in evicted), "evicted a page before its children"
        self.events["evicted"] += len(evicted)
        hashes = self.chain(request)
        for position in range(request.num_computed_tokens, end):
            self.pool[table[position // self.page_size]][position % self.page_size] = hashes[position]
        request.num_computed_tokens = end
        return True

    def forget(self, page_id: int) -> None:
        key = self.cached_hash.pop(page_id)
        del self.cached[key]
        self.num_children[self.parent.pop(key)] -= 1
        self.last_key[page_id] = key

    def expect_commit(self, request: Request) -> tuple[tuple[int, int], ...]:
        rid, table = request.request_id, self.tables[request.request_id]
        updates = []
        if self.enabled:
            for index in range(self.committed[rid], request.num_computed_tokens // self.page_size):
                key = self.page_hash(request, index)
                assert key is not None
                if key in self.cached:
                    if self.cached[key] != table[index]:
                        updates.append((index, self.cached[key]))
                        table[index] = self.cached[key]
                        self.events["duplicate"] += 1
                else:
                    parent = self.page_hash(request, index - 1)
                    assert parent is not None
                    self.cached[key], self.cached_hash[table[index]], self.parent[key] = table[index], key, parent
                    self.num_children[parent] += 1
                self.committed[rid] = index + 1
            self.next_page[rid] = self.page_hash(request, self.committed[rid])
        return tuple(updates)

    def commit(self, request: Request) -> None:
        assert self.manager.commit(request) == self.expect_commit(request)
        self.check_pool(request)

    def free(self, request: Request, cache: bool, retract: bool) -> None:
        self.check_pool(request)
        if cache:
            self.expect_commit(request)
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
        before = set(self.cached_hash)
        gone = {p for p in before - locked if self.in_namespace(self.cached_hash[p], namespace)}
        assert self.manager.clear_namespace(namespace) == len(gone)
        for page_id in gone:
            self.forget(page_id)
        self.check_counts()

    def in_namespace(self, key: int, namespace: int) -> bool:
        while key in self.parent:
            key = self.parent[key]
        return key == hash(("root", namespace))

    def check_pool(self, request: Request) -> None:
        """Every computed token's KV is still where the request's page table says."""
        hashes, table, size = self.chain(request), self.tables[request.request_id], self.page_size
        for i in range(0, request.num_computed_tokens, size):
            known = hashes[i : min(i + size, request.num_computed_tokens)]
            assert self.pool[table[i // size]][: len(known)] == known, f"request {request.request_id}, page {i // size}"

    def check_counts(self) -> None:
        own = sum(len(self.tables[r.request_id]) - self.committed[r.request_id] for r in self.running)
        stats = self.manager.stats
        assert stats == (self.num_pages, self.num_pages - len(self.cached) - own, len(self.cached))

    def check(self) -> None:
        self.manager.check_integrity()
        self.check_counts()
        locked = {self.tables[r.request_id][i] for r in self.running for i in range(self.committed[r.request_id])}
        assert self.manager.num_available_pages == self.manager.stats.num_free + len(self.cached) - len(locked)
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


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
INDEX = st.integers(0, 50)


class ManagerMachine(RuleBasedStateMachine):
    """Any order of admissions, chunks, commits, retractions and ends."""

    @initialize(
        num_pages=st.integers(1, 14), page_size=st.integers(1, 4), enabled=st.booleans(), force_miss=st.booleans()
    )
    def start(self, num_pages: int, page_size: int, enabled: bool, force_miss: bool) -> None:
        self.sim = Simulation(num_pages, page_size, enabled or force_miss, force_miss)

    def pick(self, requests: list[Request], index: int) -> Request:
        return requests[index % len(requests)]

    @rule(tokens=TOKENS, namespace=st.integers(0, 1), logits_from=st.none() | st.integers(0, 14), admit=st.booleans())
    def add(self, tokens: list[int], namespace: int, logits_from: int | None, admit: bool) -> None:
        request = self.sim.add(tokens, namespace, logits_from)
        if admit:
            self.sim.admit(request)

    @precondition(lambda self: self.sim.waiting)
    @rule(index=INDEX)
    def admit(self, index: int) -> None:
        self.sim.admit(self.pick(self.sim.waiting, index))

    @precondition(lambda self: self.sim.running)
    @rule(index=INDEX, num_tokens=st.integers(0, 9), commit=st.booleans())
    def compute(self, index: int, num_tokens: int, commit: bool) -> None:
        request = self.pick(self.sim.running, index)
        if self.sim.compute(request, num_tokens) and commit:
            self.sim.commit(request)

    @precondition(lambda self: self.sim.running)
    @rule(index=INDEX, tokens=TOKENS)
    def append(self, index: int, tokens: list[int]) -> None:
        self.pick(self.sim.running, index).token_ids.extend(tokens[:4])

    @precondition(lambda self: self.sim.running)
    @rule(index=INDEX)
    def commit(self, index: int) -> None:
        self.sim.commit(self.pick(self.sim.running, index))

    @precondition(lambda self: self.sim.running)
    @rule(index=INDEX, cache=st.booleans(), retract=st.booleans())
    def free(self, index: int, cache: bool, retract: bool) -> None:
        self.sim.free(self.pick(self.sim.running, index), cache, retract)

    @rule(namespace=st.integers(0, 1))
    def clear_namespace(self, namespace: int) -> None:
        self.sim.clear_namespace(namespace)

    @invariant()
    def holds(self) -> None:
        self.sim.check()

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.finish()


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def random_prompt(rng: random.Random, finished: list[list[int]]) -> list[int]:
    """A fresh prompt, or an earlier sequence cut anywhere and continued: a new turn, another sample, a branch."""
    base = rng.choice(finished) if finished and rng.random() < 0.8 else []
    return base[: rng.randrange(len(base) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(1, 12))]


def random_step(sim: Simulation, rng: random.Random, finished: list[list[int]], max_running: int) -> None:
    choice = rng.random()
    if choice < 0.12 and len(sim.waiting) < 8:
        prompt = random_prompt(rng, finished)[: sim.num_pages * sim.page_size]
        logits_from = rng.randrange(len(prompt)) if rng.random() < 0.1 else None
        for _ in range(rng.choice((1, 1, 3))):
            sim.add(prompt, rng.randrange(2), logits_from)
    elif choice < 0.3 and sim.waiting and len(sim.running) < max_running:
        sim.admit(rng.choice(sim.waiting))
    elif choice < 0.8 and sim.running:
        request = rng.choice(sim.running)
        if request.num_pending_tokens == 0:
            request.token_ids.append(rng.randrange(3))
        if not sim.compute(request, rng.choice((1, 1, 4, 16))):
            sim.free(rng.choice(sim.running), cache=rng.random() < 0.7, retract=True)
        elif rng.random() < 0.4:
            sim.commit(request)
    elif choice < 0.9 and sim.running:
        request = rng.choice(sim.running)
        finished[rng.randrange(len(finished)) if len(finished) > 20 else len(finished) :] = [request.token_ids]
        sim.free(request, cache=rng.random() < 0.9, retract=False)
    elif choice > 0.9995:
        sim.clear_namespace(rng.randrange(2))


@pytest.mark.parametrize("page_size", [1, 3])
@pytest.mark.parametrize(("num_pages", "max_running"), [(24, 4), (200, 10)])
def test_long_random_run(page_size: int, num_pages: int, max_running: int) -> None:
    num_steps = int(os.environ.get("HF_ACCEL_STRESS_OPS", "100000")) // 4
    rng = random.Random(num_pages + page_size)
    sim, finished = Simulation(num_pages, page_size), list[list[int]]()
    for step in range(num_steps):
        random_step(sim, rng, finished, max_running)
        if step % 499 == 0:
            sim.check()
    assert all(sim.events[name] for name in ("hit", "miss", "in flight", "duplicate", "evicted")), sim.events
    sim.finish()
