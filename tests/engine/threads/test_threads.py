"""Many callers, one batch: each gets its solo answer, and nobody pays for another's failure."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_accel
from hf_accel import SamplingParams

from .callers import CONFIG, JOIN_SECONDS, mixed_jobs, prompt, run_together


class Raise:
    """As a processor, a criterion or a streamer: raises at its fourth call."""

    def __init__(self, error: BaseException):
        self.error, self.calls = error, 0

    def _count(self):
        self.calls += 1
        if self.calls == 4:
            raise self.error

    def put(self, value):
        self._count()

    def end(self):
        pass


class RaisingProcessor(Raise, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self._count()
        return scores


class RaisingCriterion(Raise, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self._count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_mixed_callers_get_their_solo_answers(model, batch_sizes, assert_idle):
    engine = hf_accel.get_engine(model)
    jobs = mixed_jobs(model)
    solo = [job() for job in jobs]
    engine.flush_cache()
    batch_sizes.clear()
    assert run_together(jobs) == solo
    assert max(batch_sizes) >= 6  # they did share steps
    assert run_together(jobs) == solo  # and again from a warm prefix cache
    assert engine.stats().num_fallbacks == 0
    assert_idle(engine)


def test_a_new_caller_does_not_wait_for_the_one_who_drives(model, batch_sizes):
    engine = hf_accel.get_engine(model)
    long = engine.add_request(prompt(1, 8)[0], SamplingParams(temperature=0, max_tokens=400))
    started = threading.Event()
    core_drive = threading.Thread(target=lambda: (started.set(), engine.result(long)), daemon=True)
    core_drive.start()
    started.wait()
    while len(batch_sizes) < 5:
        time.sleep(0.001)
    model.generate(prompt(2, 8), do_sample=False, max_new_tokens=2)
    num_steps_when_done = len(batch_sizes)
    core_drive.join(JOIN_SECONDS)
    assert len(batch_sizes) >= 400
    assert num_steps_when_done < 200


def test_two_threads_on_models_that_share_one_config_object(tiny_llama, assert_idle):
    twin = type(tiny_llama)(tiny_llama.config).eval()
    assert twin.config is tiny_llama.config
    implementation = tiny_llama.config._attn_implementation
    inputs = prompt(3, 20, rows=2)
    options = {"do_sample": False, "max_new_tokens": 30}
    expected = [m.generate(inputs, **options).tolist() for m in (tiny_llama, twin)]
    for m in (tiny_llama, twin):
        hf_accel.patch(m, fused=False, **CONFIG)
    jobs = [lambda: tiny_llama.generate(inputs, **options).tolist(), lambda: twin.generate(inputs, **options).tolist()]
    assert run_together(jobs * 4) == expected * 4
    assert tiny_llama.config._attn_implementation == implementation
    for m in (tiny_llama, twin):
        assert_idle(hf_accel.get_engine(m))


def failing(model, kind: str, error: BaseException) -> Callable[[], Any]:
    """A `generate` call, of which one part raises `error` in the middle."""
    options = {
        "processor": lambda: {"logits_processor": LogitsProcessorList([RaisingProcessor(error)])},
        "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([RaisingCriterion(error)])},
        "streamer": lambda: {"streamer": Raise(error)},
    }[kind]()
    return lambda: model.generate(prompt(20, 15), do_sample=False, max_new_tokens=30, **options)


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("kind", ["processor", "criterion", "streamer"])
def test_an_exception_in_one_callers_own_code(model, batch_sizes, assert_idle, kind, error):
    jobs = mixed_jobs(model)[:9]
    solo = [job() for job in jobs]
    results = run_together([*jobs, failing(model, kind, error)])
    assert results[-1] is error
    assert results[:-1] == solo
    assert_idle(hf_accel.get_engine(model))


def test_an_exception_in_an_engine_requests_processor(model, batch_sizes, assert_idle):
    engine = hf_accel.get_engine(model)

    def fail(token_ids, logits):
        if len(token_ids) == 14:
            raise ZeroDivisionError("mine")
        return logits

    jobs = mixed_jobs(model)
    solo = [job() for job in jobs]
    params = SamplingParams(temperature=0, max_tokens=30, logits_processors=[fail])
    results = run_together([*jobs, lambda: engine.generate([prompt(20, 10)[0]], params)[0]])
    output = results.pop()
    assert isinstance(output.error, ZeroDivisionError)
    assert output.outputs[0].finish_reason == "error"
    assert len(output.outputs[0].token_ids) == 4
    assert results == solo
    assert_idle(engine)


def test_a_processor_that_calls_the_engine_back(model, assert_idle):
    engine = hf_accel.get_engine(model)
    ids = prompt(1, 12)

    def nested(token_ids, logits):
        model.generate(ids, do_sample=False, max_new_tokens=2)
        return logits

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            nested(None, None)
            return scores

    expected = model.generate(ids, do_sample=False, max_new_tokens=5)
    again = model.generate(ids, do_sample=False, max_new_tokens=5, logits_processor=LogitsProcessorList([Nested()]))
    assert torch.equal(again, expected)  # HF's processors run in their caller's thread, between steps
    [output] = engine.generate([ids[0]], SamplingParams(temperature=0, max_tokens=5, logits_processors=[nested]))
    assert isinstance(output.error, RuntimeError)
    assert "inside a step" in str(output.error)
    assert_idle(engine)


@pytest.mark.parametrize("where", ["device", "build"])
def test_keyboard_interrupt_inside_a_step_of_one_caller(model, monkeypatch, assert_idle, where):
    engine = hf_accel.get_engine(model)
    jobs = mixed_jobs(model)
    solo = [job() for job in jobs]
    executor = engine.core.executor
    names = {"build": ["build"], "device": ["execute", "launch"]}[where]
    parts, hit = {name: getattr(executor, name) for name in names}, []
    guilty: list[int] = []

    def interrupted(name, *args):
        time.sleep(0.001)
        if threading.get_ident() in guilty and not hit and len(engine.core.scheduler.running) >= 3:
            hit.append(True)
            raise KeyboardInterrupt
        return parts[name](*args)

    for name in names:
        monkeypatch.setattr(executor, name, functools.partial(interrupted, name))

    def guilty_caller():
        guilty.append(threading.get_ident())
        while not hit:  # until it is the one who drives, in company
            model.generate(prompt(21, 10), do_sample=False, max_new_tokens=40)

    def repeated(job):
        def run():
            results = [job()]
            while not hit:
                results.append(job())
            return all(result == results[0] for result in results) and results[0]

        return run

    results = run_together([guilty_caller, *map(repeated, jobs)])
    assert isinstance(results[0], KeyboardInterrupt)
    assert results[1:] == solo
    assert_idle(engine)


class Poison:
    """A forward hook on the embedding that raises when the step holds the marked token."""

    def __init__(self, model, token: int):
        self.token, self.calls = token, 0
        self.handle = model.get_input_embeddings().register_forward_hook(self)

    def __call__(self, module, args, output):
        if (args[0] == self.token).any():
            self.calls += 1
            raise ZeroDivisionError("marked token")


def test_a_hook_that_raises_fails_only_the_guilty_request(tiny_llama, assert_idle):
    hf_accel.patch(tiny_llama, **CONFIG)
    engine = hf_accel.get_engine(tiny_llama)
    with torch.no_grad():
        tiny_llama.lm_head.weight[255] = 0.0  # never the likeliest one
    prompts = [(prompt(s, 9 + s)[0] % 255).tolist() for s in range(6)]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    expected = [o.outputs[0].token_ids for o in engine.generate(prompts, greedy)]
    poison = Poison(tiny_llama, 255)
    guilty = [*prompts[0], 255, 3]
    outputs = engine.generate([*prompts[:3], guilty, *prompts[3:]], greedy)
    assert isinstance(outputs.pop(3).error, ZeroDivisionError)
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert all(o.error is None for o in outputs)

    def call(ids):
        return lambda: tiny_llama.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0].tolist()

    results = run_together([*map(call, prompts), call(guilty)])
    assert isinstance(results.pop(), ZeroDivisionError)
    assert results == [p + e for p, e in zip(prompts, expected, strict=True)]
    assert poison.calls >= 2
    assert_idle(engine)
