"""The scheduler planning ahead of results, on a simulated device that works late and in order: the tokens are the same.

The device runs a step only when its result is asked for: by then pages and slots that the step writes to may have had a
new owner for a while. Steps fail, and leave garbage where they wrote.
"""

from __future__ import annotations

import os
import random
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_accel.config import EngineConfig, FaultInjection
from hf_accel.request import Request, RequestStatus
from hf_accel.scheduler.output import UNKNOWN_TOKEN, SchedulerOutput

from .simulation import Simulation, alone, history_of, verified

CONFIGS = st.builds(
    dict,
    page_size=st.sampled_from([1, 2, 4, 8]),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(1, 40),
    max_prefill_chunk=st.none() | st.integers(1, 9),
    policy=st.sampled_from(["fcfs", "lpm", "priority"]),
    enable_prefix_cache=st.booleans(),
)
# Retracted all the time, a prompt in many small chunks that leave nothing in the cache would never be through.
RETRACTING = st.builds(
    dict,
    page_size=st.sampled_from([1, 2, 4, 8]),
    max_num_batched_tokens=st.integers(24, 60),
    faults=st.builds(FaultInjection, retract_every=st.sampled_from([2, 3, 5]), force_miss=st.booleans()),
)
BATCHES = st.lists(
    st.tuples(
        st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 12), st.booleans()
    ),
    min_size=1,
    max_size=10,
)
SHARED = [[], [1] * 9, [1] * 9 + [2] * 8, [3, 2, 1] * 7]


@dataclass
class Launched:
    """A step on the device's queue, with all that the host knew when it put it there."""

    output: SchedulerOutput
    tables: list[dict[int, int]]
    known: list[tuple[int, ...]]
    external: list[bool]


class LateSimulation(Simulation):
    """Steps of both kinds, in an order that `rng` draws."""

    def __init__(self, config: EngineConfig, num_pages: int, rng: random.Random, failures: float = 0.0) -> None:
        super().__init__(config, num_pages)
        self.rng, self.failures = rng, failures
        self.in_flight: deque[Launched] = deque()
        self.token_table: dict[int, int] = {}
        self.num_ahead = self.num_junk = self.num_rolled_back = self.num_held = 0

    def step(self) -> int:
        done = 0
        if self.scheduler.may_run_ahead and self.scheduler.has_work and self.rng.random() < 0.9:
            done += self._launch()
        while self.in_flight and (len(self.in_flight) > 1 or not done or self.rng.random() < 0.2):
            self._collect()
            done += 1
        if not done:
            done = super().step()
        return done

    def _launch(self) -> int:
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for item in output.requests:
            self.tables.setdefault(item.slot, {}).update(item.page_updates)
        requests = [self.requests[item.request_id] for item in output.requests]
        self.in_flight.append(
            Launched(
                output,
                [dict(self.tables[item.slot]) for item in output.requests],
                [tuple(r.token_ids) for r in requests],
                [r.external_sampling for r in requests],
            )
        )
        assert not any(r.needs_host for r in requests)
        self.scheduler.launched(output)
        self.num_ahead += sum(item.token_ids == (UNKNOWN_TOKEN,) for item in output.requests)
        self.scheduler.check_integrity()
        return len(output.requests) + len(output.failed) + len(output.retracted)

    def _collect(self) -> None:
        if self.rng.random() < self.failures:
            return self._fail()
        launched = self.in_flight.popleft()
        sampled = self._run(launched)
        self.num_junk += sum(self.requests[i].status.ended for i in sampled)
        self.scheduler.update(launched.output, sampled)
        self.scheduler.check_integrity()
        return None

    def _run(self, launched: Launched) -> dict[int, list[int]]:
        size, sampled = self.config.page_size, {}
        self._copy(launched)
        rows = list(zip(launched.output.requests, launched.tables, launched.known, strict=True))
        histories = []
        for item, table, known in rows:
            history = known + ((self.token_table[item.slot],) if item.token_ids == (UNKNOWN_TOKEN,) else ())
            history = history_of(item, history)
            end = item.start + len(item.token_ids)
            assert len(history) >= end and (
                item.token_ids == (UNKNOWN_TOKEN,) or history[item.start : end] == item.token_ids
            )
            histories.append(history)
            for position in range(item.start, end):
                self.pages[table[position // size]][position % size] = history[: position + 1]
        for (item, table, _), history in zip(rows, histories, strict=True):
            end = item.start + len(item.token_ids)
            for p in range(end):
                assert self.pages[table[p // size]][p % size] == history[: p + 1], (
                    "the pages do not hold the row's tokens"
                )
            if item.at_end:
                assert end == len(history)
                sampled[item.request_id] = verified(item, history)
                self.token_table[item.slot] = sampled[item.request_id][0]
                self.num_held += len(sampled[item.request_id]) - 1
        return sampled

    def _copy(self, launched: Launched) -> None:
        for source, destination in launched.output.page_copies:
            self.pages[destination] = list(self.pages[source])

    def _fail(self) -> None:
        """The oldest step fails half way; the others are junk. The copies that they came with are made all the same."""
        for launched in self.in_flight:
            self._copy(launched)
            for item, table in zip(launched.output.requests, launched.tables, strict=True):
                for position in range(item.start, item.start + len(item.token_ids)):
                    self.pages[table[position // self.config.page_size]][position % self.config.page_size] = (
                        "garbage",
                    )
        self.token_table = dict.fromkeys(self.token_table, 99)
        self.in_flight.clear()
        self.scheduler.roll_back()
        self.scheduler.check_integrity()
        self.num_rolled_back += 1
        super().step()


@settings(max_examples=int(os.environ.get("HF_ACCEL_STRESS_EXAMPLES", "150")), deadline=None)
@given(
    config=CONFIGS | RETRACTING,
    batch=BATCHES,
    spare=st.integers(0, 20),
    external=st.integers(0, 2),
    failures=st.sampled_from([0.0, 0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_late_results_change_no_token(
    config: dict, batch: list, spare: int, external: int, failures: float, seed: int
) -> None:
    rng = random.Random(seed)
    longest = max(len(SHARED[kind]) + len(tail) + new for kind, tail, new, _ in batch)
    simulation = LateSimulation(EngineConfig(**config), -(-longest // config["page_size"]) + spare, rng, failures)
    expected: list[tuple[Request, list[int]]] = []
    rows = []
    for index, (kind, tail, new, eos) in enumerate(batch):
        for _ in range(rng.randrange(4)):
            simulation.step()
        prompt = SHARED[kind] + tail
        options = {"namespace": rng.randrange(2), "skill": rng.choice([None, 0.5, 0.9, 1.0])}
        request = simulation.add(prompt, new, eos, external=index < external, **options)
        expected.append((request, alone(prompt, new, eos)))
        if index < external:
            rows.append(request)
            simulation.cohorts = [rows]
        if rng.random() < 0.2:
            victim = rng.choice(expected)[0]
            simulation.scheduler.finish(victim, RequestStatus.ABORTED, "abort")
            simulation.scheduler.check_integrity()
    simulation.run()
    while simulation.in_flight:
        simulation._collect()
    simulation.cache.check_idle()
    for request, tokens in expected:
        got = request.token_ids[request.num_prompt_tokens :]
        if request.status is RequestStatus.ABORTED:
            assert got == tokens[: len(got)]
        else:
            assert request.status is RequestStatus.FINISHED and got == tokens


def test_the_simulation_reaches_what_it_is_about() -> None:
    config = EngineConfig(page_size=2, max_num_batched_tokens=16, faults=FaultInjection(retract_every=5))
    simulation = LateSimulation(config, 40, random.Random(0), failures=0.1)
    for i in range(8):
        simulation.add([1, 2, 3, i % 4, i], 30, i % 2 == 0, skill=0.9 if i > 5 else None)
    simulation.run()
    assert (
        simulation.num_ahead > 20
        and simulation.num_held > 5
        and simulation.num_junk > 2
        and simulation.num_rolled_back > 0
    )
    assert simulation.scheduler.num_retractions > 2


def test_no_step_is_planned_past_the_length() -> None:
    simulation = LateSimulation(EngineConfig(page_size=4), 20, random.Random(0))
    request = simulation.add([1, 2, 3], 2, False)
    outputs = []
    for _ in range(2):
        outputs.append(simulation.scheduler.schedule())
        simulation.scheduler.launched(outputs[-1])
    assert [o.requests[0].token_ids for o in outputs] == [(1, 2, 3), (UNKNOWN_TOKEN,)]
    assert not simulation.scheduler.has_work  # both tokens are on their way
    assert simulation.scheduler.schedule().requests == () and not request.status.ended
    for output, token in zip(outputs, (3, 3), strict=True):
        simulation.scheduler.update(output, {0: [token]})
    assert request.status is RequestStatus.FINISHED and request.token_ids == [1, 2, 3, 3, 3]


def test_a_retracted_row_waits_for_its_token_and_keeps_it() -> None:
    simulation = LateSimulation(EngineConfig(page_size=4), 20, random.Random(0))
    scheduler, request = simulation.scheduler, simulation.add([1, 2, 3], 9, True)
    output = scheduler.schedule()
    scheduler.launched(output)
    scheduler._retract(request, None)
    assert not scheduler.has_work and scheduler.schedule().requests == ()
    scheduler.check_integrity()
    scheduler.update(output, {0: [2]})
    assert request.token_ids == [1, 2, 3, 2] and request.num_computed_tokens == 0
    assert scheduler.schedule().requests[0].token_ids == (1, 2, 3, 2)


def test_results_come_in_order() -> None:
    simulation = LateSimulation(EngineConfig(page_size=4), 20, random.Random(0))
    simulation.add([1, 2, 3], 9, False)
    first = simulation.scheduler.schedule()
    simulation.scheduler.launched(first)
    second = simulation.scheduler.schedule()
    simulation.scheduler.launched(second)
    with pytest.raises(AssertionError, match="out of order"):
        simulation.scheduler.update(second, {0: [1]})


def test_only_known_tokens_reach_the_tree() -> None:
    """A step ahead has computed a page's last token: until its result is there, nobody else may find that page."""
    simulation = LateSimulation(EngineConfig(page_size=4, max_prefill_chunk=4), 20, random.Random(0))
    scheduler = simulation.scheduler
    first = simulation.add([1, 2, 3, 4, 5, 6, 7, 8, 9], 3, False)
    outputs = []
    for _ in range(2):
        outputs.append(scheduler.schedule())
        scheduler.launched(outputs[-1])
    assert first.num_launched_tokens == 8 and simulation.cache.stats.num_cached == 0
    scheduler.update(outputs[0], {})
    assert simulation.cache.stats.num_cached == 1
    scheduler.finish(first, RequestStatus.ABORTED, "abort")
    assert simulation.cache.stats.num_cached == 1  # what the second step writes is nobody's
    scheduler.update(outputs[1], {})
    simulation.cache.check_idle()


def test_a_chunk_in_flight_counts_nothing_for_the_next_admission() -> None:
    simulation = LateSimulation(EngineConfig(page_size=4, max_prefill_chunk=4), 20, random.Random(0))
    scheduler, request = simulation.scheduler, simulation.add([1, 2, 3, 4, 5, 6, 7, 8, 9], 3, False)
    first = scheduler.schedule()
    scheduler.launched(first)
    scheduler._retract(request, None)
    second = scheduler.schedule()  # on other pages
    scheduler.launched(second)
    assert [o.requests[0].start for o in (first, second)] == [0, 0]
    scheduler.update(first, {})
    assert (request.num_computed_tokens, request.num_launched_tokens) == (0, 4)
    scheduler.update(second, {})
    assert request.num_computed_tokens == 4
    scheduler.check_integrity()
