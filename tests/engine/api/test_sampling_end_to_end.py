"""SamplingParams end to end through an Engine, against what an HF forward says."""

from __future__ import annotations

import pytest
import torch

from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection

from .hf_answers import CONFIG, greedy, hf_greedy, hf_logprobs, ids_of


def test_logprobs(engine, model):
    ids = ids_of(1, 19)
    params = SamplingParams(temperature=0.8, top_k=30, seed=3, max_tokens=10, logprobs=4)
    [output] = engine.generate([ids], params)
    completion = output.outputs[0]
    expected = hf_logprobs(model, ids + completion.token_ids)[len(ids) - 1 :]
    assert len(completion.logprobs) == 10
    for row, token, found in zip(expected, completion.token_ids, completion.logprobs, strict=False):
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, tokens = row.topk(4)
        assert list(found.top) == tokens.tolist()
        assert list(found.top.values()) == pytest.approx(values.tolist(), abs=1e-4)
    [output] = engine.generate([ids], greedy(3, logprobs=0))
    assert [p.top for p in output.outputs[0].logprobs] == [{}] * 3


@pytest.mark.parametrize("warm", [False, True])
def test_prompt_logprobs(engine, model, warm):
    ids = ids_of(2, 43)
    if warm:
        engine.generate([ids], greedy(3))
    [output] = engine.generate([ids], greedy(4, prompt_logprobs=2, n=2))
    expected = hf_logprobs(model, ids)
    found = output.prompt_logprobs
    assert found[0] is None
    assert len(found) == 43
    for i in range(1, 43):
        assert found[i].logprob == pytest.approx(float(expected[i - 1, ids[i]]), abs=1e-4)
        assert list(found[i].top) == expected[i - 1].topk(2).indices.tolist()
    for completion in output.outputs:
        assert completion.token_ids == hf_greedy(model, ids, 4)


def test_prompt_logprobs_alone(engine, model):
    ids = ids_of(2, 30)
    [output] = engine.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=0))
    expected = hf_logprobs(model, ids)
    assert [p.logprob for p in output.prompt_logprobs[1:]] == pytest.approx(
        [float(expected[i - 1, ids[i]]) for i in range(1, 30)], abs=1e-4
    )
    assert output.outputs[0].token_ids == []
    assert output.outputs[0].finish_reason == "length"


def test_prompt_logprobs_survive_retraction(model):
    engine = Engine(model, num_pages=64, page_size=4, max_prefill_chunk=6, faults=FaultInjection(retract_every=3))
    ids = ids_of(2, 43)
    [output] = engine.generate([ids], greedy(6, prompt_logprobs=0, logprobs=0))
    assert engine.stats().num_retractions > 1
    expected = hf_logprobs(model, ids + output.outputs[0].token_ids)
    tokens = ids + output.outputs[0].token_ids
    found = [p.logprob for p in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs)]
    assert found == pytest.approx([float(expected[i - 1, tokens[i]]) for i in range(1, len(tokens))], abs=1e-4)


def test_eos_ignore_eos_and_min_tokens(model, assert_idle):
    ids = ids_of(3, 12)
    tokens = hf_greedy(model, ids, 12)
    eos = tokens[4]
    first = tokens.index(eos)
    model.generation_config.eos_token_id = eos
    engine = Engine(model, **CONFIG)
    stopped = engine.generate([ids], greedy(12))[0].outputs[0]
    assert stopped.token_ids == tokens[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    ignoring = engine.generate([ids], greedy(12, ignore_eos=True))[0].outputs[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == (tokens, "length")
    longer = engine.generate([ids], greedy(12, min_tokens=first + 3))[0].outputs[0]
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, min_new_tokens=first + 3)
    assert longer.token_ids == expected[0, 12:].tolist()
    assert_idle(engine)


def test_stop_token_ids(engine, model):
    ids = ids_of(3, 12)
    tokens = hf_greedy(model, ids, 12)
    stop = tokens[6]
    completion = engine.generate([ids], greedy(12, stop_token_ids=[stop]))[0].outputs[0]
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_stop_strings(engine, model, byte_tokenizer):
    ids = byte_tokenizer("stop here")["input_ids"]
    script = byte_tokenizer("abc END xyz")["input_ids"]  # a processor dictates the text

    def dictate(token_ids, logits):
        forced = torch.full_like(logits, -1e9)
        forced[script[len(token_ids) - len(ids)]] = 0.0
        return forced

    params = greedy(11, stop=["END", "never"], logits_processors=[dictate])
    completion = engine.generate(["stop here"], params)[0].outputs[0]
    assert completion.text == "abc "
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "END")
    assert completion.token_ids == script[:7]
    chunks = list(engine.stream("stop here", params))
    assert "".join(c.text for c in chunks) == "abc "
    assert chunks[-1].finish_reason == "stop"
    partial = greedy(6, stop=["END"], logits_processors=[dictate])  # ends inside what may become the stop string
    assert engine.generate(["stop here"], partial)[0].outputs[0].text == "abc EN"
    assert "".join(c.text for c in engine.stream("stop here", partial)) == "abc EN"


def test_logit_bias(engine, model):
    ids = ids_of(5, 10)
    assert engine.generate([ids], greedy(4, logit_bias={17: 1e4}))[0].outputs[0].token_ids == [17] * 4
    banned = hf_greedy(model, ids, 1)[0]
    second = hf_logprobs(model, ids)[-1].topk(2).indices[1].item()
    assert engine.generate([ids], greedy(1, logit_bias={banned: -1e4}))[0].outputs[0].token_ids == [second]


def test_penalties_are_hfs(engine, model):
    ids = ids_of(5, 10)
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20, repetition_penalty=1.4)
    found = engine.generate([ids], greedy(20, repetition_penalty=1.4))[0].outputs[0].token_ids
    assert found == expected[0, 10:].tolist()


def test_processors_see_the_whole_history(engine, model):
    ids = ids_of(5, 21)
    seen = []

    def look(token_ids, logits):
        seen.append(list(token_ids))
        return logits

    engine.generate([ids], greedy(3))  # so that the prompt comes from the cache
    tokens = engine.generate([ids], greedy(5, logits_processors=[look]))[0].outputs[0].token_ids
    assert tokens == hf_greedy(model, ids, 5)
    assert seen == [ids + tokens[:i] for i in range(5)]


def test_n_completions_share_the_prompt(engine):
    ids = ids_of(6, 64)
    [output] = engine.generate([ids], SamplingParams(n=5, seed=1, max_tokens=6))
    assert [o.index for o in output.outputs] == list(range(5))
    assert len({tuple(o.token_ids) for o in output.outputs}) > 1
    stats = engine.stats()
    assert stats.num_prompt_tokens == 5 * 64
    assert stats.num_cached_tokens == 4 * 63  # all but the last token, whose logits are wanted


def test_seeded_sampling_does_not_depend_on_company(engine):
    params = SamplingParams(temperature=1.2, top_p=0.95, seed=42, max_tokens=15, n=2)
    alone = [o.token_ids for o in engine.generate([ids_of(1, 14)], params)[0].outputs]
    others = [SamplingParams(seed=s, max_tokens=5 + s, temperature=0.5 * s) for s in range(6)]
    company = engine.generate([ids_of(s, 6 + 4 * s) for s in range(6)] + [ids_of(1, 14)], [*others, params])
    assert [o.token_ids for o in company[-1].outputs] == alone
    engine.flush_cache()
    assert [o.token_ids for o in engine.generate([ids_of(1, 14)], params)[0].outputs] == alone
    other_seed = SamplingParams(temperature=1.2, top_p=0.95, seed=43, max_tokens=15)
    assert engine.generate([ids_of(1, 14)], other_seed)[0].outputs[0].token_ids != alone[0]


def test_unseeded_sampling_follows_torch_manual_seed(engine):
    def draw() -> list[int]:
        return engine.generate([ids_of(1, 14)], SamplingParams(max_tokens=12))[0].outputs[0].token_ids

    torch.manual_seed(7)
    first = draw()
    assert draw() != first
    torch.manual_seed(7)
    assert draw() == first


def test_sampling_follows_the_models_distribution(model):
    engine = Engine(model, **CONFIG)
    ids = ids_of(8, 6)
    probs = hf_logprobs(model, ids)[-1].div(0.5).softmax(-1)
    [output] = engine.generate([ids], SamplingParams(n=2000, seed=0, max_tokens=1, temperature=0.5))
    counts = torch.bincount(torch.tensor([o.token_ids[0] for o in output.outputs]), minlength=256) / 2000
    assert float((counts - probs).abs().max()) < 0.05
