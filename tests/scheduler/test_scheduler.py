"""The scheduler against a simulated model: every request gets the tokens it would get alone, whatever the pool and budget."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_accel.config import EngineConfig, FaultInjection
from hf_accel.kv_cache.manager import MIN_TOKENS_WORTH_WAITING
from hf_accel.request import RequestStatus
from hf_accel.scheduler.scheduler import OutOfPagesError

from .simulation import Simulation, alone

configs = st.builds(
    dict,
    page_size=st.sampled_from([1, 2, 4, 8]),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(1, 40),
    max_prefill_chunk=st.none() | st.integers(1, 9),
    policy=st.sampled_from(["fcfs", "lpm", "priority"]),
    enable_prefix_cache=st.booleans(),
)
prompts = st.lists(
    st.tuples(
        st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 12), st.booleans()
    ),
    min_size=1,
    max_size=10,
)
SHARED = [[], [1] * 9, [1] * 9 + [2] * 8, [3, 2, 1] * 7]


@settings(max_examples=int(os.environ.get("HF_ACCEL_STRESS_EXAMPLES", "150")), deadline=None)
@given(config=configs, batch=prompts, spare=st.integers(0, 20), cohort=st.integers(0, 4), seed=st.integers(0, 1000))
def test_every_request_gets_its_own_tokens(config: dict, batch: list, spare: int, cohort: int, seed: int) -> None:
    longest = max(len(SHARED[kind]) + len(tail) + new for kind, tail, new, _ in batch)
    num_pages = -(-longest // config["page_size"]) + spare
    simulation = Simulation(EngineConfig(**config), num_pages)
    expected, rows = [], []
    rng = random.Random(seed)
    for index, (kind, tail, new, eos) in enumerate(batch):
        if rng.random() < 0.3:
            simulation.step()
        external = index < cohort
        options = {"namespace": rng.randrange(2), "skill": rng.choice([None, 0.5, 0.9, 1.0])}
        request = simulation.add(SHARED[kind] + tail, new, eos, external=external, **options)
        expected.append((request, alone(SHARED[kind] + tail, new, eos)))
        if external:
            rows.append(request)
    if rows:
        simulation.cohorts.append(rows)
    simulation.run()
    for request, tokens in expected:
        assert request.status is RequestStatus.FINISHED
        assert request.token_ids[request.num_prompt_tokens :] == tokens


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize("force_miss", [False, True])
def test_forced_retraction_changes_nothing(every: int, force_miss: bool) -> None:
    faults = FaultInjection(retract_every=every, force_miss=force_miss)
    simulation = Simulation(EngineConfig(page_size=4, max_num_batched_tokens=64, faults=faults), 40)
    expected = [(simulation.add([1] * 9 + [i], 15, False), alone([1] * 9 + [i], 15, False)) for i in range(4)]
    simulation.run()
    assert simulation.scheduler.num_retractions > 0
    for request, tokens in expected:
        assert request.token_ids[10:] == tokens


def test_a_request_that_can_never_fit_fails_alone() -> None:
    simulation = Simulation(EngineConfig(page_size=4), 4)
    doomed = simulation.add([1] * 14, 30, False)
    others = [simulation.add([2, i], 5, False) for i in range(3)]
    simulation.run()
    assert doomed.status is RequestStatus.FAILED
    assert isinstance(doomed.error, OutOfPagesError) and "num_pages" in str(doomed.error)
    assert all(r.status is RequestStatus.FINISHED and r.num_output_tokens == 5 for r in others)


def test_equal_prompts_are_computed_once() -> None:
    simulation = Simulation(EngineConfig(page_size=4, max_num_batched_tokens=16), 60)
    prompt = [1, 2, 3] * 11
    requests = [simulation.add(prompt, 3, False) for _ in range(5)]
    steps = []
    schedule = simulation.scheduler.schedule
    simulation.scheduler.schedule = lambda: steps.append(schedule()) or steps[-1]  # type: ignore[method-assign]
    simulation.run()
    computed = sum(step.num_tokens for step in steps)
    assert [r.num_cached_tokens for r in requests] == [0] + [len(prompt) - 1] * 4
    assert computed == len(prompt) + 4 + 5 * 2


@pytest.mark.parametrize("length", [5, 16, 17, 31, 40])
@pytest.mark.parametrize("budget", [7, 64])
def test_samples_of_one_prompt_compute_only_its_last_token(length: int, budget: int) -> None:
    simulation = Simulation(EngineConfig(page_size=16, max_num_batched_tokens=budget), 60)
    prompt = [i % 5 for i in range(length)]
    requests = [simulation.add(prompt, 6, False) for _ in range(8)]
    simulation.run()
    first, *others = [r.num_cached_tokens or 0 for r in requests]
    lost = 0 if budget > length else MIN_TOKENS_WORTH_WAITING - 1  # the last chunk may be too short to wait for
    assert first == 0 and length - 1 - lost <= min(others) <= max(others) == length - 1
    assert budget < 64 or simulation.num_copies == (7 if (length - 1) % 16 else 0)


def test_a_few_common_tokens_are_not_waited_for() -> None:
    simulation = Simulation(EngineConfig(page_size=16), 60)
    requests = [simulation.add([1, 2, 3, 10 + i, 20 + i], 2, False) for i in range(4)]
    simulation.step()
    assert all(r.status is RequestStatus.RUNNING and not r.num_cached_tokens for r in requests)
    later = simulation.add([1, 2, 3, 10, 21], 2, False)
    simulation.run()
    assert later.num_cached_tokens == 4


def test_a_retracted_request_comes_back_from_its_own_partial_page() -> None:
    simulation = Simulation(EngineConfig(page_size=4, faults=FaultInjection(retract_every=2)), 8)
    request = simulation.add([1, 2, 3, 1, 2, 3], 4, False)
    simulation.step()
    output = simulation.scheduler.schedule()  # retracted, and admitted again
    assert request.num_retractions == 1 and request.num_computed_tokens == 6 and len(output.page_copies) == 1
    assert output.requests[0].start == 6
    assert simulation.scheduler.schedule().page_copies == ()


def test_copies_go_out_when_nothing_is_computed() -> None:
    simulation = Simulation(EngineConfig(page_size=4, max_num_batched_tokens=64), 4)
    simulation.add([1, 2, 3, 1, 2, 3], 2, False)
    simulation.run()
    doomed = simulation.add([1, 2, 3, 1, 2, 3] * 4, 2, False)
    output = simulation.scheduler.schedule()
    assert output.failed == (doomed.request_id,) and not output.requests and len(output.page_copies) == 1
    simulation.run()


def test_retract_all_recomputes_from_nothing() -> None:
    simulation = Simulation(EngineConfig(page_size=4), 60)
    requests = [simulation.add([1, 2, 3, 1, 2, 3, i], 5, False) for i in range(3)]
    for _ in range(3):
        simulation.step()
    simulation.scheduler.retract_all()
    simulation.scheduler.check_integrity()
    assert simulation.cache.stats.num_free == 60 and list(simulation.scheduler.waiting) == [0, 1, 2]
    simulation.pages = [[None] * 4 for _ in range(60)]
    simulation.run()
    for request in requests:
        assert request.token_ids[7:] == alone(request.token_ids[:7], 5, False)


def test_priority_and_longest_prefix_order() -> None:
    simulation = Simulation(EngineConfig(page_size=2, max_num_seqs=1, policy="priority"), 60)
    late, urgent = simulation.add([1, 1], 2, False), simulation.add([2, 2], 2, False)
    late.priority, urgent.priority = 5, 1
    simulation.step()
    assert urgent.status is RequestStatus.RUNNING and late.status is RequestStatus.WAITING
    simulation = Simulation(EngineConfig(page_size=2, max_num_seqs=1, policy="lpm"), 60)
    simulation.add([3] * 9, 1, False)
    simulation.step()
    other, same = simulation.add([1] * 9, 1, False), simulation.add([3] * 9, 1, False)
    simulation.step()
    assert same.status.ended and other.status is RequestStatus.WAITING


def test_abort_in_every_state_gives_everything_back() -> None:
    for steps in range(6):
        simulation = Simulation(EngineConfig(page_size=2, max_num_batched_tokens=4), 30)
        victim = simulation.add([1] * 10, 5, False)
        other = simulation.add([1] * 8 + [2], 5, False)
        for _ in range(steps):
            simulation.step()
        simulation.scheduler.finish(victim, RequestStatus.ABORTED, "abort")
        simulation.scheduler.check_integrity()
        simulation.run()
        assert victim.status in (RequestStatus.ABORTED, RequestStatus.FINISHED)
        assert other.token_ids[9:] == alone([1] * 8 + [2], 5, False)
