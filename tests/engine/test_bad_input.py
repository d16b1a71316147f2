"""What cannot run says so, with the remedy, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection
from hf_accel.scheduler.scheduler import OutOfPagesError

CONFIG = {"num_pages": 16, "page_size": 4, "faults": FaultInjection(check_integrity=True)}
GREEDY = SamplingParams(temperature=0, max_tokens=6)
GOOD = [5, 6, 7, 8, 9]


@pytest.fixture
def engine(tiny_llama, assert_idle):
    engine = Engine(tiny_llama, **CONFIG)
    expected = tiny_llama.generate(torch.tensor([GOOD]), do_sample=False, max_new_tokens=6)[0, 5:].tolist()
    yield engine
    assert_idle(engine)
    assert engine.generate([GOOD], GREEDY)[0].outputs[0].token_ids == expected  # it still works
    assert_idle(engine)


@pytest.fixture
def patched(tiny_llama, assert_idle):
    hf_accel.patch(tiny_llama, **CONFIG)
    yield tiny_llama
    assert_idle(hf_accel.get_engine(tiny_llama))
    hf_accel.unpatch(tiny_llama)


BAD_PROMPTS = {
    "empty": ([], "empty: give at least one token"),
    "negative": ([1, -1], "token id -1 is outside the vocabulary"),
    "too large": ([1, 256], "token id 256 is outside the vocabulary"),
    "longer than the pool": ([1] * 65, "the KV pool holds 64: raise num_pages"),
    "longer than the model": ([1] * 513, "the model takes at most 512: shorten"),
    "text": ("hello", "text prompts need a tokenizer"),
    "chat": ([{"role": "user", "content": "hello"}], "text prompts need a tokenizer"),
    "nothing": (None, "give either a prompt or input_ids"),
}


CALLS = {
    "add_request": lambda engine, prompt: engine.add_request(prompt, GREEDY),
    "stream": lambda engine, prompt: next(engine.stream(prompt, GREEDY)),
    "generate": lambda engine, prompt: engine.generate([GOOD, prompt, GOOD], GREEDY),
    "score": lambda engine, prompt: engine.score(prompt, [[1], [2]]),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
@pytest.mark.parametrize("call", CALLS)
def test_bad_prompt(engine, call, name):
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=message):
        CALLS[call](engine, prompt)


def test_prompt_and_input_ids(engine):
    with pytest.raises(ValueError, match="either a prompt or input_ids"):
        engine.add_request(GOOD, GREEDY, input_ids=GOOD)


def test_bad_continuations(engine):
    with pytest.raises(ValueError, match="a continuation is empty"):
        engine.score(GOOD, [[1], []])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.score(GOOD, [[1], [300]])
    with pytest.raises(ValueError, match="KV pool holds 64"):
        engine.score(GOOD, [[1], [2] * 60])


def test_stop_strings_without_a_tokenizer(engine):
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        engine.generate([GOOD], SamplingParams(stop="x"))


def test_lists_of_different_lengths(engine):
    with pytest.raises(ValueError, match="2 prompts but 3 SamplingParams"):
        engine.generate([GOOD, GOOD], [GREEDY] * 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.1}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": 2.0}, "min_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more"),
        ({"n": 0}, "n must be at least 1"),
        ({"max_tokens": -1}, "max_tokens must be 0 or more"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens=8"),
        ({"stop": ["a", ""]}, "stop must be non-empty"),
        ({"logprobs": -1}, "logprobs must be 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be 0"),
    ],
)
def test_bad_sampling_params(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


@pytest.mark.parametrize("make", [hf_accel.patch, Engine])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"pagesize": 8}, "unknown engine option.* pagesize; known: .*page_size"),
        ({"page_size": 0}, "page_size must be a positive integer"),
        ({"num_pages": -3}, "num_pages must be a positive integer"),
        ({"memory_fraction": 0.0}, "memory_fraction must be in"),
        ({"policy": "lifo"}, "policy must be one of fcfs, lpm, priority"),
        ({"attention_backend": "flash"}, "attention_backend must be one of"),
        ({"pack_weights": "yes"}, "pack_weights must be"),
        ({"overlap": "always"}, "overlap must be True, False or 'auto'"),
    ],
)
def test_bad_option(tiny_llama, make, bad, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_llama, **bad)
    assert not hf_accel.is_patched(tiny_llama)


def test_logit_bias_outside_the_vocabulary(engine):
    good, bad = engine.generate([GOOD, GOOD], [GREEDY, SamplingParams(max_tokens=4, logit_bias={256: 1.0})])
    assert isinstance(bad.error, ValueError)
    assert "256" in str(bad.error)
    assert good.error is None
    assert len(good.outputs[0].token_ids) == 6


def test_processor_of_a_wrong_shape(engine):
    params = SamplingParams(max_tokens=4, logits_processors=[lambda ids, logits: logits[:3]])
    [output] = engine.generate([GOOD], params)
    assert isinstance(output.error, ValueError)
    assert "shape (256,)" in str(output.error)


def test_double_result_and_unknown_request(engine):
    request_id = engine.add_request(GOOD, GREEDY)
    assert len(engine.result(request_id).outputs[0].token_ids) == 6
    for unknown in (request_id, 12345):
        with pytest.raises(ValueError, match="already handed over, or it never was"):
            engine.result(unknown)
        with pytest.raises(ValueError, match="already handed over, or it never was"):
            next(engine.stream_request(unknown))
        engine.abort(unknown)  # too late, not wrong


def test_a_request_that_outgrows_the_pool(engine):
    outgrowing, small = engine.generate([[1] * 40, GOOD], [SamplingParams(temperature=0, max_tokens=200), GREEDY])
    assert isinstance(outgrowing.error, OutOfPagesError)
    assert "raise num_pages or memory_fraction, or shorten" in str(outgrowing.error)
    assert outgrowing.outputs[0].finish_reason == "error"
    assert len(outgrowing.outputs[0].token_ids) == 64 - 40 + 1  # all that the pool could hold
    assert small.error is None
    assert len(small.outputs[0].token_ids) == 6


def test_a_stream_that_outgrows_the_pool(engine):
    tokens = []
    stream = engine.stream([1] * 50, SamplingParams(temperature=0, max_tokens=200))
    with pytest.raises(OutOfPagesError):
        tokens.extend(chunk.token_ids for chunk in stream if chunk.token_ids)
    assert len(tokens) == 64 - 50 + 1  # one a chunk


def test_as_long_as_the_model(tiny_llama, assert_idle):
    engine = Engine(tiny_llama, num_pages=200, page_size=4)
    [output] = engine.generate([[7] * 500], SamplingParams(temperature=0, max_tokens=None, min_tokens=100))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 12
    assert_idle(engine)


def hf_error(model, *args, **kwargs) -> BaseException:
    """The error of the same call on the model's own code."""
    hf_accel.unpatch(model)
    with pytest.raises(Exception) as info:
        model.generate(*args, **kwargs)
    hf_accel.patch(model, **CONFIG)
    return info.value


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        ([GOOD], {"max_new_tokens": 4, "max_new_tokenz": 4}),
        ([GOOD], {"max_new_tokens": 4, "do_sample": True, "temperature": -1.0}),
        ([GOOD], {"max_new_tokens": 4, "do_sample": True, "top_k": -3}),
        ([GOOD], {"max_new_tokens": -1}),
        ([GOOD], {"max_new_tokens": 4, "stop_strings": ["x"]}),
        ([GOOD], {"max_new_tokens": 4, "num_return_sequences": 2, "do_sample": False}),
        ([[5, 256]], {"max_new_tokens": 4}),
        ([[5, -7]], {"max_new_tokens": 4}),
        ([GOOD], {"max_new_tokens": 4, "attention_mask": torch.ones(1, 3, dtype=torch.long)}),
        ([[]], {"max_new_tokens": 4}),
    ],
)
def test_generate_gives_hfs_own_error(patched, ids, options):
    inputs = torch.tensor(ids, dtype=torch.long)
    expected = hf_error(patched, inputs, **options)
    with pytest.raises(type(expected)) as info:
        patched.generate(inputs, **options)
    assert str(info.value) == str(expected)


def test_generate_longer_than_the_pool_falls_back(patched, assert_idle):
    ids = torch.randint(0, 256, (1, 60))
    hf_accel.unpatch(patched)
    expected = patched.generate(ids, do_sample=False, max_new_tokens=10)
    hf_accel.patch(patched, **CONFIG)
    assert torch.equal(patched.generate(ids, do_sample=False, max_new_tokens=10), expected)
    reasons = hf_accel.get_engine(patched).stats().fallback_reasons
    assert len(reasons) == 1
    assert "does not fit in the KV pool of 16 pages" in next(iter(reasons))


def test_calls_after_shutdown(tiny_llama):
    engine = Engine(tiny_llama, **CONFIG)
    waiting = engine.add_request(GOOD, GREEDY)
    engine.shutdown()
    engine.shutdown()  # again is fine
    assert engine.core.executor.runner.pool.num_bytes == 0
    for call in (
        lambda: engine.generate([GOOD], GREEDY),
        lambda: engine.add_request(GOOD),
        lambda: engine.result(waiting),
        lambda: engine.score(GOOD, [[1]]),
    ):
        with pytest.raises(RuntimeError, match="shut down"):
            call()


def test_busy_engine_refuses_to_sleep_or_flush(engine):
    request_id = engine.add_request(GOOD, GREEDY)
    for when in ("waiting", "running"):
        for action in (engine.flush_cache, engine.sleep):
            with pytest.raises(RuntimeError, match="needs an idle engine: wait for the running requests, or abort"):
                action()
        if when == "waiting":
            engine.step()
    assert len(engine.result(request_id).outputs[0].token_ids) == 6
    engine.flush_cache()
    engine.sleep()
