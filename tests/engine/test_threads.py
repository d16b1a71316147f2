"""Many callers, one batch: each gets its solo answer, and nobody pays for another's failure."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import hf_accel
from hf_accel import SamplingParams
from hf_accel.config import FaultInjection

CONFIG: dict[str, Any] = {"num_pages": 512, "page_size": 8, "faults": FaultInjection(check_integrity=True)}
JOIN_SECONDS = 120


class Favour(LogitsProcessor):
    """Adds to the logit that follows the last token, so that its history matters."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % scores.shape[1]] += 2.0
        return scores


class Collect(BaseStreamer):
    def __init__(self):
        self.ids: list[int] = []

    def put(self, value):
        self.ids += value.reshape(-1).tolist()

    def end(self):
        self.ids.append(-1)


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


def prompt(seed: int, length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Each job in its own thread, all at once; their results, or the exceptions they raised."""
    results: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + JOIN_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a caller hangs"
    return results


@pytest.fixture(params=[True, False], ids=["fused", "own-layers"])
def model(tiny_llama, request):
    hf_accel.patch(tiny_llama, fused=request.param, **CONFIG)
    yield tiny_llama
    hf_accel.unpatch(tiny_llama)


@pytest.fixture
def batch_sizes(model, monkeypatch):
    """Requests in each step; steps are slowed down a little so that callers meet."""
    executor, sizes = hf_accel.get_engine(model).core.executor, []
    execute = executor.execute

    def recording(batch, requests):
        sizes.append(len(requests))
        time.sleep(0.001)
        return execute(batch, requests)

    monkeypatch.setattr(executor, "execute", recording)
    return sizes


def mixed_jobs(model) -> list[Callable[[], Any]]:
    """Callers of every kind, each deterministic whatever runs beside it."""
    engine = hf_accel.get_engine(model)
    greedy = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    padded = prompt(2, 21, rows=3)
    mask = torch.ones_like(padded)
    mask[1, :9] = mask[2, :4] = 0

    def streamed_generate():
        streamer = Collect()
        model.generate(prompt(5, 13), streamer=streamer, **greedy)
        return streamer.ids

    def scores():
        out = model.generate(prompt(6, 9), return_dict_in_generate=True, output_scores=True, **greedy)
        return out.sequences.tolist()

    def sampled(seed):
        params = SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=20, n=3, repetition_penalty=1.1)
        return [o.token_ids for o in engine.generate([prompt(seed, 12)[0]], params)[0].outputs]

    def streamed(seed):
        params = SamplingParams(temperature=0.7, top_k=20, seed=seed, max_tokens=24)
        return [t for chunk in engine.stream(prompt(seed, 18)[0], params) for t in chunk.token_ids]

    def scored():
        prefix = prompt(9, 30)[0]
        return [round(s.total, 3) for s in engine.score(prefix, [[1, 2, 3], [4], [5, 6, 7, 8, 9]])]

    return [
        lambda: model.generate(prompt(1, 33), **greedy).tolist(),
        lambda: model.generate(padded, attention_mask=mask, **greedy).tolist(),
        lambda: model.generate(prompt(3, 17), repetition_penalty=1.3, **greedy).tolist(),
        lambda: model.generate(prompt(4, 8), logits_processor=LogitsProcessorList([Favour()]), **greedy).tolist(),
        lambda: model.generate(prompt(4, 8), do_sample=True, top_k=1, max_new_tokens=19).tolist(),
        streamed_generate,
        scores,
        lambda: sampled(7),
        lambda: sampled(8),
        lambda: streamed(10),
        lambda: streamed(11),
        scored,
    ]


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


@pytest.mark.parametrize("where", ["execute", "build"])
def test_keyboard_interrupt_inside_a_step_of_one_caller(model, monkeypatch, assert_idle, where):
    engine = hf_accel.get_engine(model)
    jobs = mixed_jobs(model)
    solo = [job() for job in jobs]
    executor = engine.core.executor
    step_part, hit = getattr(executor, where), []
    guilty: list[int] = []

    def interrupted(*args):
        time.sleep(0.001)
        if threading.get_ident() in guilty and not hit and len(engine.core.scheduler.running) >= 3:
            hit.append(True)
            raise KeyboardInterrupt
        return step_part(*args)

    monkeypatch.setattr(executor, where, interrupted)

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


def test_a_stream_whose_reader_stops(model, assert_idle):
    engine = hf_accel.get_engine(model)
    jobs = mixed_jobs(model)
    solo = [job() for job in jobs]
    abandoned = []

    def stop_reading():
        stream = engine.stream(prompt(22, 10)[0], SamplingParams(temperature=0, max_tokens=300))
        abandoned.append(stream)
        return [next(stream).token_ids for _ in range(3)]

    results = run_together([stop_reading, *jobs])
    assert len(results[0]) == 3
    assert results[1:] == solo
    abandoned.pop().close()
    assert_idle(engine)


def test_a_stream_dropped_without_closing_is_aborted(model, assert_idle):
    engine = hf_accel.get_engine(model)
    stream = engine.stream(prompt(22, 10)[0], SamplingParams(temperature=0, max_tokens=300))
    next(stream)
    assert engine.stats().num_running == 1
    del stream
    assert_idle(engine)


def test_chunks_are_complete_when_another_thread_drives(model, assert_idle):
    engine = hf_accel.get_engine(model)
    params = SamplingParams(temperature=0, max_tokens=30, n=2)
    expected = [o.token_ids for o in engine.generate([prompt(23, 10)[0]], params)[0].outputs]

    def read():
        found: list[list[int]] = [[], []]
        for chunk in engine.stream(prompt(23, 10)[0], params):
            found[chunk.index] += chunk.token_ids
            time.sleep(0.0005)  # the others step on meanwhile
        return found

    for _ in range(3):
        assert run_together([read] * 8) == [expected] * 8
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


def test_many_async_readers_and_one_that_is_cancelled(model, assert_idle):
    engine = hf_accel.get_engine(model)
    params = [SamplingParams(temperature=0.8, seed=s, max_tokens=25) for s in range(12)]
    expected = [engine.generate([prompt(s, 10)[0]], params[s])[0].outputs[0].token_ids for s in range(12)]

    async def read(s: int) -> list[int]:
        return [t async for chunk in engine.astream(prompt(s, 10)[0], params[s]) for t in chunk.token_ids]

    async def leave_early() -> None:
        async for _ in engine.astream(prompt(30, 10)[0], SamplingParams(temperature=0, max_tokens=400)):
            pass

    async def main() -> list[list[int]]:
        leaving = asyncio.create_task(leave_early())
        reading = [asyncio.create_task(read(s)) for s in range(12)]
        await asyncio.sleep(0.02)
        leaving.cancel()
        results = await asyncio.gather(*reading)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return results

    assert asyncio.run(main()) == expected
    assert_idle(engine, patience=10)


def test_the_event_loop_stays_free(model, batch_sizes):
    engine = hf_accel.get_engine(model)

    async def main() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        stream = engine.astream(prompt(1, 10)[0], SamplingParams(temperature=0, max_tokens=60))
        tokens = [t async for chunk in stream for t in chunk.token_ids]
        ticker.cancel()
        assert len(tokens) == 60
        return ticks

    assert asyncio.run(main()) > 20


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
