"""Running ahead changes no answer: lengths, ends, sampling, aborts, retraction and what the prefix cache holds."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from hf_accel import SamplingParams
from hf_accel.request import RequestStatus

from ..api.hf_answers import greedy, hf_greedy, ids_of
from .device import Forwards, device_threads


def test_the_next_step_is_planned_and_launched_before_the_last_ones_result_is_there(engine, model):
    forwards = Forwards(engine, held=True)
    engine.add_request(ids_of(1, 9), greedy(4))
    [request] = engine.core.requests.values()
    assert engine.step() == []  # the device does not move, and nobody waits for it
    assert (request.num_tokens, request.num_placeholders, request.num_launched_tokens) == (9, 1, 9)
    second = threading.Thread(target=engine.step)
    second.start()
    deadline = time.monotonic() + 30
    while request.num_placeholders < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (request.num_tokens, request.num_placeholders, request.num_launched_tokens) == (9, 2, 10)
    assert request.num_computed_tokens == 0 and len(forwards.sizes) <= 1
    forwards.let_go()
    second.join(30)
    assert (request.num_tokens, request.num_placeholders, request.num_computed_tokens) == (10, 1, 9)
    forwards.let_go(9)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert outputs[0].outputs[0].token_ids == hf_greedy(model, ids_of(1, 9), 4)
    assert forwards.sizes == [1] * 4 and forwards.unknown == [False, True, True, True] and all(forwards.ahead)


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {"seed": 1},
    "filtered": {"seed": 2, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "several": {"seed": 3, "n": 3, "temperature": 1.3},
    "penalised": {"seed": 4, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "greedy_penalised": {"temperature": 0, "frequency_penalty": 2.5, "repetition_penalty": 1.8},
    "biased": {"seed": 5, "logit_bias": {7: 6.0, 9: -100.0, 200: 4.0}},
    "min_tokens": {"seed": 6, "min_tokens": 8, "logit_bias": {7: 9.0, 8: 9.0}, "stop_token_ids": [7, 8]},
    "logprobs": {"seed": 7, "logprobs": 3, "top_p": 0.95},
    "greedy_logprobs": {"temperature": 0, "logprobs": 0},
}


def summary(outputs: list[Any]) -> list[Any]:
    """All that a caller sees, log-probabilities rounded."""
    return [
        [
            (c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs and [_rounded(p) for p in c.logprobs])
            for c in output.outputs
        ]
        + [output.num_cached_tokens, output.error]
        for output in outputs
    ]


def _rounded(logprob: Any) -> Any:
    return round(logprob.logprob, 3), {token: round(value, 3) for token, value in logprob.top.items()}


@pytest.mark.parametrize("faults", [{}, {"retract_every": 3}, {"force_miss": True}], ids=["none", "retract", "miss"])
def test_every_parameter_gives_the_same_on_and_off(make_engine, assert_idle, faults):
    prompts = [ids_of(20 + i, 3 + 2 * i) for i in range(len(PARAMS))]
    params = [SamplingParams(max_tokens=14, **options) for options in PARAMS.values()]
    found = []
    for overlap in (False, True):
        engine = make_engine(overlap, faults, num_pages=40, max_num_batched_tokens=24)
        forwards = Forwards(engine)
        outputs = summary(engine.generate(prompts, params))
        found.append([output[:-2] for output in outputs])  # when what is cached may differ
        assert all(error is None for *_, error in outputs)
        assert all(forwards.ahead) is overlap and any(forwards.unknown) is overlap
        assert_idle(engine)
    assert found[0] == found[1]


def test_an_eos_is_learnt_one_step_late_and_leaves_no_trace(make_engine, model, assert_idle):
    ids = ids_of(5, 10)
    answer = hf_greedy(model, ids, 12)
    stop = next(i for i in range(5, 12) if answer[i] not in answer[:i])
    seen = []
    for overlap in (False, True):
        engine = make_engine(overlap)
        forwards = Forwards(engine)
        [output] = engine.generate([ids], greedy(12, stop_token_ids=[answer[stop]]))
        assert output.outputs[0].token_ids == answer[: stop + 1] and output.outputs[0].finish_reason == "stop"
        assert len(forwards.sizes) == stop + 1 + overlap  # one for nobody
        stats = engine.stats()
        assert stats.num_generated_tokens == stop + 1
        longer = [*ids, *answer[: stop + 1], *ids_of(6, 3)]  # over the end, and over where the junk was written
        [again] = engine.generate([longer], greedy(6))
        assert again.outputs[0].token_ids == hf_greedy(model, longer, 6)
        seen.append((again.num_cached_tokens, stats.num_pages_cached, stats.num_pages_free))
        assert_idle(engine)
    assert seen[0] == seen[1] and seen[0][0] == len(ids) + stop


def test_many_ends_at_once_in_a_tiny_pool(make_engine, model, assert_idle):
    """Pages of rows that ended go to new rows while the step that writes for the old ones is in flight."""
    prompts = [ids_of(40 + i, 4 + i % 5) for i in range(24)]
    expected = [hf_greedy(model, prompt, 10) for prompt in prompts]
    stops = [[answer[2 + i % 6]] for i, answer in enumerate(expected)]
    engine = make_engine(num_pages=14, page_size=2, max_num_seqs=5)
    outputs = engine.generate(prompts, [greedy(10, stop_token_ids=stop) for stop in stops])
    for output, answer, [stop] in zip(outputs, expected, stops, strict=True):
        assert output.outputs[0].token_ids == answer[: answer.index(stop) + 1]
    assert_idle(engine)


def test_stop_strings(make_engine, assert_idle):
    found = []
    for overlap in (False, True):
        engine = make_engine(overlap)
        texts = [o.text for o in engine.generate(["one", "two", "three"], greedy(16))]
        params = [greedy(16, stop=text[4:6]) for text in texts]
        outputs = engine.generate(["one", "two", "three"], params)
        assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}
        found.append(summary(outputs))
        assert_idle(engine)
    assert found[0] == found[1]


def test_abort_in_flight(engine, model):
    kept, dropped = engine.add_request(ids_of(1, 9), greedy(20)), engine.add_request(ids_of(2, 9), greedy(90))
    for _ in range(4):
        engine.step()
    assert engine.core._overlapped.in_flight
    engine.abort(dropped)
    output = engine.result(dropped)
    assert output.outputs[0].token_ids == hf_greedy(model, ids_of(2, 9), 90)[:3]  # what was known then
    later = engine.add_request(ids_of(3, 30), greedy(9))  # takes the slot and the pages
    assert engine.result(later).outputs[0].token_ids == hf_greedy(model, ids_of(3, 30), 9)
    assert engine.result(kept).outputs[0].token_ids == hf_greedy(model, ids_of(1, 9), 20)
    assert engine.stats().num_generated_tokens == 3 + 9 + 20


def test_retracted_in_flight(engine, model):
    request_id = engine.add_request(ids_of(1, 9), greedy(12))
    [request] = engine.core.requests.values()
    for _ in range(3):
        engine.step()
    with engine.core.lock:
        engine.core.scheduler._retract(request, None)
    assert request.status is RequestStatus.WAITING and request.num_placeholders == 1
    known = request.num_tokens
    engine.step()
    assert request.num_tokens == known + 1 and request.num_placeholders == 0  # its token came, nothing was launched
    assert engine.result(request_id).outputs[0].token_ids == hf_greedy(model, ids_of(1, 9), 12)


def test_requests_that_need_the_host_run_in_the_plain_loop_and_the_others_with_them(engine, model):
    seen: list[list[int]] = []

    def note(token_ids: list[int], logits: Any) -> Any:
        seen.append(token_ids)
        return logits

    forwards = Forwards(engine)
    params = [greedy(30), SamplingParams(temperature=0, max_tokens=5, logits_processors=[note]), greedy(3)]
    prompts = [ids_of(i, 8 + i) for i in range(3)]
    outputs = engine.generate(prompts, params)
    expected = [hf_greedy(model, prompt, 30) for prompt in prompts]
    assert [o.outputs[0].token_ids for o in outputs] == [expected[0], expected[1][:5], expected[2][:3]]
    assert seen == [prompts[1] + expected[1][:i] for i in range(5)]  # whole histories
    assert not any(forwards.ahead[:5]) and all(forwards.ahead[5:])
    [one] = engine.generate([ids_of(9, 12)], greedy(3, prompt_logprobs=1))
    assert len(one.prompt_logprobs) == 12 and one.outputs[0].token_ids == hf_greedy(model, ids_of(9, 12), 3)


def test_generate_and_streams_leave_nothing_in_flight(engine, model):
    answer = hf_greedy(model, ids_of(4, 11), 8)
    tokens = []
    for chunk in engine.stream(ids_of(4, 11), greedy(8)):
        tokens += chunk.token_ids
        assert len(chunk.token_ids) == 1 and not engine.core._overlapped.in_flight
    assert tokens == answer


def test_between_two_ends_of_one_call_a_step_stays_in_flight(engine, model, monkeypatch):
    drains, drain = [], engine.core._drain
    monkeypatch.setattr(engine.core, "_drain", lambda: drains.append(True) or drain())
    prompts, counts = [ids_of(i, 5) for i in range(5)], [3, 5, 6, 9, 12]
    outputs = engine.generate(prompts, [greedy(count) for count in counts])
    for output, prompt, count in zip(outputs, prompts, counts, strict=True):
        assert output.outputs[0].token_ids == hf_greedy(model, prompt, count)
    assert not drains and not engine.core._overlapped.in_flight


def test_off_and_auto(make_engine, assert_idle):
    num_threads = len(device_threads())
    for overlap in (False, "auto"):
        engine = make_engine(overlap)
        forwards = Forwards(engine)
        engine.generate([ids_of(1, 8)], greedy(4))
        assert not engine.core.executor.overlaps and not any(forwards.ahead) and not any(forwards.unknown)
        assert len(device_threads()) == num_threads
        assert_idle(engine)
