"""KVCacheManager driven like a scheduler would, in any order, on a simulated pool.

HF_ACCEL_STRESS_OPS sets the length of the plain random run, HF_ACCEL_STRESS_EXAMPLES the number of hypothesis runs.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_accel.request import Request

from .simulation import Simulation

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
TestManagerMachine.settings = settings(
    max_examples=int(os.environ.get("HF_ACCEL_STRESS_EXAMPLES", "120")), stateful_step_count=40, deadline=None
)


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
        for _ in range(rng.choice((1, 1, 4))):
            if sim.waiting and len(sim.running) < max_running:
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


@pytest.mark.parametrize("page_size", [1, 3, 8])
@pytest.mark.parametrize(("num_pages", "max_running"), [(24, 4), (200, 10)])
def test_long_random_run(page_size: int, num_pages: int, max_running: int) -> None:
    num_steps = int(os.environ.get("HF_ACCEL_STRESS_OPS", "100000")) // 4
    rng = random.Random(num_pages + page_size)
    sim, finished = Simulation(num_pages, page_size), list[list[int]]()
    for step in range(num_steps):
        random_step(sim, rng, finished, max_running)
        if step % 499 == 0:
            sim.check()
    seen = ["hit", "miss", "in flight", "duplicate", "evicted"]
    if page_size > 1:
        seen += ["tail of the tree", "tail of a request", "order matters", "extended", "partial kept", "partial held"]
    assert all(sim.events[name] for name in seen), sim.events
    sim.finish()
