"""The Engine by hand: each call, against what an HF forward says."""

from __future__ import annotations

import asyncio

import pytest
import torch

from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection

from .hf_answers import CONFIG, greedy, hf_greedy, hf_logprobs, ids_of


def test_add_step_result(engine, model):
    first, second = engine.add_request(ids_of(1, 20), greedy(5)), engine.add_request(ids_of(2, 9), greedy(9))
    assert engine.has_unfinished_requests
    finished = []
    while engine.has_unfinished_requests:
        finished += engine.step()
    assert [o.request_id for o in finished] == [first, second]
    for output, seed, length, count in ((finished[0], 1, 20, 5), (finished[1], 2, 9, 9)):
        assert output.prompt_token_ids == ids_of(seed, length)
        assert output.outputs[0].token_ids == hf_greedy(model, ids_of(seed, length), count)
        assert output.outputs[0].finish_reason == "length"
        assert output.finished
        assert output.error is None
    assert engine.step() == []
    third = engine.add_request(input_ids=torch.tensor(ids_of(3, 11)), params=greedy(4))
    assert engine.result(third).outputs[0].token_ids == hf_greedy(model, ids_of(3, 11), 4)


def test_generate_in_order_with_parameters_of_their_own(engine, model):
    prompts = [ids_of(s, 5 + 3 * s) for s in range(10)]
    outputs = engine.generate(prompts, [greedy(3 + s) for s in range(10)], use_tqdm=False)
    for s, output in enumerate(outputs):
        assert output.outputs[0].token_ids == hf_greedy(model, prompts[s], 3 + s)
    assert engine.generate([]) == []


def test_text_prompts_and_texts(engine, model, byte_tokenizer):
    text = "Hello, wörld"
    [output] = engine.generate(text, greedy(20))
    ids = byte_tokenizer(text)["input_ids"]
    assert output.prompt == text
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == hf_greedy(model, ids, 20)
    assert output.text == byte_tokenizer.decode(output.outputs[0].token_ids)
    one_tensor = engine.generate(torch.tensor(ids), greedy(20))
    assert one_tensor[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_stream(engine, model, byte_tokenizer):
    ids = ids_of(4, 25)
    chunks = list(engine.stream(ids, greedy(15)))
    assert [t for c in chunks for t in c.token_ids] == hf_greedy(model, ids, 15)
    assert len(chunks) == 15
    assert "".join(c.text for c in chunks) == engine.generate([ids], greedy(15))[0].text
    assert [c.finish_reason for c in chunks] == [None] * 14 + ["length"]


def test_stream_of_several_completions(engine):
    params = SamplingParams(n=3, seed=5, max_tokens=8)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in engine.stream(ids_of(4, 25), params):
        found[chunk.index] += chunk.token_ids
    assert list(found.values()) == [o.token_ids for o in engine.generate([ids_of(4, 25)], params)[0].outputs]


def test_astream(engine, model):
    ids = ids_of(4, 25)

    async def read() -> list[int]:
        return [t async for chunk in engine.astream(ids, greedy(6)) for t in chunk.token_ids]

    assert asyncio.run(read()) == hf_greedy(model, ids, 6)


def test_abort(engine):
    kept, dropped = engine.add_request(ids_of(1, 9), greedy(20)), engine.add_request(ids_of(2, 9), greedy(200))
    for _ in range(6):
        engine.step()
    engine.abort(dropped)
    engine.abort(dropped)
    assert engine.stats().num_running == 1
    output = engine.result(dropped)
    assert output.outputs[0].finish_reason == "abort"
    assert 1 <= len(output.outputs[0].token_ids) <= 6
    assert engine.result(kept).outputs[0].finish_reason == "length"
    waiting = engine.add_request(ids_of(3, 9), greedy(20))
    engine.abort(waiting)
    assert engine.result(waiting).outputs[0].token_ids == []


def test_stats(engine):
    engine.generate([ids_of(1, 32)], greedy(8))
    engine.generate([ids_of(1, 32) + [9] * 8], greedy(8))
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (72, 16)
    assert stats.num_cached_tokens == 32
    assert stats.cache_hit_rate == pytest.approx(32 / 72)
    assert stats.num_pages_total == 256
    assert stats.num_fallbacks == 0
    assert stats.tokens_per_second > 0
    assert stats.num_steps >= 16
    assert stats.to_dict()["num_cached_tokens"] == 32


def test_flush_and_sleep(engine, model):
    ids = ids_of(6, 33)
    expected = hf_greedy(model, ids, 5)
    assert engine.generate([ids], greedy(5))[0].num_cached_tokens == 0
    assert engine.generate([ids], greedy(5))[0].num_cached_tokens == 32
    engine.flush_cache()
    assert engine.stats().num_pages_free == 256
    assert engine.generate([ids], greedy(5))[0].num_cached_tokens == 0
    pool = engine.core.executor.runner.pool
    num_bytes = pool.num_bytes
    assert num_bytes == 256 * 8 * 2 * 2 * 2 * 16 * 4  # pages, tokens, layers, K and V, KV heads, head_dim, fp32
    engine.sleep()
    engine.sleep()
    assert pool.num_bytes == 0
    [output] = engine.generate([ids], greedy(5))  # wakes by itself
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == expected
    engine.sleep()
    engine.wake()
    assert pool.num_bytes == num_bytes
    assert engine.generate([ids], greedy(5))[0].outputs[0].token_ids == expected


# -- isolation, scoring, order --


def test_cache_salt_isolates(engine):
    ids = ids_of(7, 40)

    def cached(salt) -> int:
        return engine.result(engine.add_request(ids, greedy(2), cache_salt=salt)).num_cached_tokens

    assert [cached(s) for s in ("a", "b", None, "a", "b", None)] == [0, 0, 0, 39, 39, 39]


def test_score(engine, model):
    prefix, continuations = ids_of(8, 45), [ids_of(9, 6), ids_of(10, 1), hf_greedy(model, ids_of(8, 45), 3)]
    for expected_cached in (0, 44):
        scores = engine.score(prefix, continuations)
        for score, tail in zip(scores, continuations, strict=True):
            rows = hf_logprobs(model, prefix + tail)[len(prefix) - 1 : -1]
            expected = rows[torch.arange(len(tail)), tail].tolist()
            assert score.logprobs == pytest.approx(expected, abs=1e-4)
            assert score.total == pytest.approx(sum(expected), abs=1e-3)
            assert score.is_greedy == (rows.argmax(-1).tolist() == tail)
        assert scores[0].num_cached_tokens == expected_cached
        few_left = engine.config.max_prefill_chunk == 7 and not expected_cached  # 42 computed: not worth another step
        assert all(s.num_cached_tokens == (42 if few_left else 44) for s in scores[1:])
    assert scores[2].is_greedy
    assert engine.score(prefix, []) == []
    assert engine.score(prefix, continuations[:1], cache_salt="other")[0].num_cached_tokens == 0


def test_score_of_text(engine, model, byte_tokenizer):
    [score] = engine.score("one two", [" three"])
    ids, tail = byte_tokenizer("one two")["input_ids"], byte_tokenizer(" three")["input_ids"]
    rows = hf_logprobs(model, ids + tail)[len(ids) - 1 : -1]
    assert score.total == pytest.approx(float(rows[torch.arange(len(tail)), tail].sum()), abs=1e-3)


def test_score_in_a_pool_that_cannot_hold_all_at_once(model, assert_idle):
    engine = Engine(model, num_pages=8, page_size=4, faults=FaultInjection(check_integrity=True))
    prefix, continuations = ids_of(8, 17), [ids_of(s, 9) for s in range(6)]
    for score, tail in zip(engine.score(prefix, continuations), continuations, strict=True):
        rows = hf_logprobs(model, prefix + tail)[len(prefix) - 1 : -1]
        assert score.logprobs == pytest.approx(rows[torch.arange(9), tail].tolist(), abs=1e-4)
    assert_idle(engine)


def test_priority_policy(model, assert_idle):
    engine = Engine(model, policy="priority", max_num_seqs=1, **CONFIG)
    order = {engine.add_request(ids_of(p, 8), greedy(2), priority=p): p for p in (3, 1, 2, 0)}
    finished = []
    while engine.has_unfinished_requests:
        finished += [order[o.request_id] for o in engine.step()]
    assert finished == [0, 1, 2, 3]
    assert_idle(engine)


def test_fcfs_policy(model):
    engine = Engine(model, policy="fcfs", max_num_seqs=1, **CONFIG)
    ids = [engine.add_request(ids_of(p, 8), greedy(2), priority=p) for p in (3, 1, 2, 0)]
    finished = []
    while engine.has_unfinished_requests:
        finished += [o.request_id for o in engine.step()]
    assert finished == ids


def test_lpm_policy_takes_the_longest_cached_prefix_first(model):
    engine = Engine(model, policy="lpm", max_num_seqs=1, **CONFIG)
    engine.generate([ids_of(1, 40)], greedy(1))
    ids = [engine.add_request(prompt, greedy(2)) for prompt in (ids_of(2, 40), ids_of(1, 16), ids_of(1, 40))]
    finished = []
    while engine.has_unfinished_requests:
        finished += [o.request_id for o in engine.step()]
    assert finished == [ids[2], ids[1], ids[0]]
