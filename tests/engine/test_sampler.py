"""The sampler: against transformers' own processors row by row, by chi-square, and one bad row among good ones."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as hf

from hf_accel.engine.inverse_cdf import invert, uniform
from hf_accel.engine.logits_filters import filter_logits
from hf_accel.engine.sampled import logprobs_of
from hf_accel.engine.sampler import Sampler, _first_of_highest
from hf_accel.sampling_params import SamplingParams

from .sampler_rows import make_row, sample


def _hf_scores(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What `generate` would sample from, for one row [1, vocab_size]."""
    scores = logits
    if params.temperature != 1.0:
        scores = hf.TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1.0:
        scores = hf.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0.0:
        scores = hf.MinPLogitsWarper(params.min_p)(None, scores)
    return scores


# -- filters --


@pytest.mark.parametrize("vocab_size", [7, 100, 1000])
@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "masked"])
def test_filters_keep_what_hf_keeps(vocab_size, kind):
    rng = random.Random(f"{vocab_size}-{kind}")
    for _ in range(15):
        logits = torch.randn(6, vocab_size) * {"peaked": 6.0, "flat": 0.3, "tied": 2.0, "masked": 3.0}[kind]
        if kind == "tied":
            logits = logits.round()
        if kind == "masked":
            logits[torch.rand_like(logits) < 0.5] = -torch.inf
            logits[:, 0] = 1.0
        params = [
            SamplingParams(
                temperature=rng.choice([1.0, 0.3, 0.7, 1.7]),
                top_k=rng.choice([0, 0, 2, 5, 50, vocab_size, 10 * vocab_size]),
                top_p=rng.choice([1.0, 0.05, 0.5, 0.9, 0.95, 0.999]),
                min_p=rng.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
            )
            for _ in range(6)
        ]
        before = logits.clone()
        ours = filter_logits(logits, params)
        assert torch.equal(logits, before)
        for i, p in enumerate(params):
            assert torch.equal(ours[i : i + 1], _hf_scores(logits[i : i + 1], p)), (i, p)


def test_top_p_where_candidates_are_not_enough_and_ties_at_the_edge():
    flat = torch.zeros(3000)
    flat[10] = 0.5
    edge = torch.full((3000,), -30.0)
    edge[[5, 900, 2000]] = torch.tensor([1.0, 1.0, 2.0])
    logits = torch.stack([flat, edge])
    params = [SamplingParams(top_p=0.7), SamplingParams(top_p=0.7)]
    ours = filter_logits(logits, params)
    for i in range(2):
        assert torch.equal(ours[i : i + 1], _hf_scores(logits[i : i + 1], params[i]))
    assert ours[1].isfinite().sum() == 2


# -- greedy --


def test_plain_greedy_takes_the_first_of_equals():
    logits = torch.randn(4, 50)
    logits[1, [7, 9]] = 100.0
    expected = logits.argmax(-1).tolist()
    assert [t.token_id for t in sample(logits, *[make_row(SamplingParams(temperature=0))] * 4)] == expected
    assert expected[1] == 7


def test_mixed_batch_keeps_rows_apart():
    logits = torch.randn(9, 50)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(top_k=1),
        SamplingParams(temperature=0, repetition_penalty=1.3),
        SamplingParams(temperature=0.5, top_p=0.8, logit_bias={3: 2.0}),
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(top_k=4, presence_penalty=0.5),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0, logits_processors=[lambda ids, scores: -scores]),
    ]
    rows = [make_row(p, token_ids=[i, i + 1, i + 2], num_prompt_tokens=2, seed=i) for i, p in enumerate(kinds)]
    together = sample(logits, *rows)
    alone = [sample(logits[i : i + 1], row)[0] for i, row in enumerate(rows)]
    order = random.Random(0).sample(range(9), 9)
    shuffled = sample(logits[order], *[rows[i] for i in order])
    assert together == alone
    assert [shuffled[order.index(i)] for i in range(9)] == together
    assert together[0].token_id == logits[0].argmax() and together[8].token_id == logits[8].argmin()


def test_empty_batch():
    assert Sampler().sample(torch.empty(0, 10), []) == []


# -- drawing --


def test_uniform_is_uniform_and_depends_on_both_arguments():
    draws = torch.tensor(
        [uniform(seed, position) for seed in range(100) for position in range(100)], dtype=torch.float64
    )
    assert draws.min() >= 0 and draws.max() < 1
    assert len(set(draws.tolist())) == 10_000
    counts = torch.histc(draws, 50, 0, 1)
    assert ((counts - 200) ** 2 / 200).sum() < 110  # chi-square, 49 degrees of freedom: p about 1e-6
    grid = draws.view(100, 100) - 0.5
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):  # neighbours in position, and in seed
        assert abs((a * b).mean() * 12) < 0.06
    assert uniform(-1, 0) != uniform(1, 0) and uniform(2**70, 5) == uniform(2**70, 5)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(top_k=5, top_p=0.8), SamplingParams(min_p=0.1)],
)
def test_draws_follow_the_filtered_distribution(params):
    logits = torch.randn(1, 20) * 1.5
    probs = _hf_scores(logits, params).softmax(-1)[0]
    num_draws = 4000
    rows = [make_row(params, token_ids=range(i % 7), num_prompt_tokens=0, seed=i) for i in range(num_draws)]
    counts = Counter(t.token_id for t in sample(logits.expand(num_draws, -1), *rows))
    assert all(probs[token_id] > 0 for token_id in counts)
    kept = [i for i in range(20) if probs[i] * num_draws >= 5]
    chi_square = sum((counts[i] - num_draws * probs[i]) ** 2 / (num_draws * probs[i]) for i in kept)
    degrees = max(len(kept) - 1, 1)
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees) + 5


def test_same_seed_same_token_other_position_other_numbers():
    logits = torch.zeros(1, 10_000)
    row = make_row(SamplingParams(), seed=7)
    first = sample(logits, row)[0].token_id
    assert sample(logits, row)[0].token_id == first
    others = {sample(logits, make_row(SamplingParams(), token_ids=range(n), seed=7))[0].token_id for n in range(20)}
    assert len(others) > 15


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 1000, 5000])
def test_inversion_is_the_plain_one(vocab_size):
    probs = torch.randn(50, vocab_size).mul(4).softmax(-1)
    probs[torch.rand_like(probs) < 0.6] = 0.0
    probs[:, vocab_size // 2] += 0.01
    numbers = torch.rand(50, 1, dtype=torch.float64)
    numbers[0], numbers[1] = 0.0, 1 - 2.0**-53
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0]
    token_ids, valid = invert(probs, numbers)
    assert valid.all()
    assert (probs.gather(1, token_ids[:, None]) > 0).all()
    assert torch.equal(token_ids[2:], expected[2:])
    assert token_ids[0] == probs[0].nonzero()[0] and token_ids[1] == probs[1].nonzero()[-1]


def test_large_batches_are_drawn_in_parts_with_the_same_result(monkeypatch):
    logits = torch.randn(7, 300)
    rows = [make_row(SamplingParams(top_p=0.9, temperature=1 + i / 5), seed=i) for i in range(7)]
    whole = sample(logits, *rows)
    monkeypatch.setattr("hf_accel.engine.sampler._CPU_CHUNK", 650)
    assert sample(logits, *rows) == whole


def test_tokens_of_no_probability_are_never_drawn(monkeypatch):
    logits = torch.full((1, 5), -torch.inf)
    logits[0, [1, 3]] = 0.0
    for number, expected in ((0.0, 1), (0.499, 1), (0.5, 3), (1 - 2.0**-53, 3)):
        monkeypatch.setattr("hf_accel.engine.sampler.uniform", lambda seed, position, number=number: number)
        assert sample(logits, make_row(SamplingParams()))[0].token_id == expected


# -- log-probabilities --


def test_logprobs_are_the_models_own():
    logits = torch.randn(3, 40)
    expected = logits.log_softmax(-1)
    rows = [
        make_row(SamplingParams(temperature=0, logprobs=0)),
        make_row(SamplingParams(temperature=0.2, top_k=3, logprobs=5, repetition_penalty=2.0), seed=3),
        make_row(SamplingParams(temperature=0)),
    ]
    results = sample(logits, *rows)
    assert results[0].top_logprobs == {} and results[2].logprob is None and results[2].top_logprobs is None
    for i in (0, 1):
        assert results[i].logprob == pytest.approx(expected[i, results[i].token_id].item(), abs=1e-5)
    assert list(results[1].top_logprobs) == expected[1].topk(5).indices.tolist()
    assert list(results[1].top_logprobs.values()) == pytest.approx(expected[1].topk(5).values.tolist(), abs=1e-5)


def test_logprobs_of_given_tokens():
    logits = torch.randn(4, 6)
    expected = logits.log_softmax(-1)
    found = logprobs_of(logits, [0, 5, 2, 2], top_n=100)
    assert [own for own, _ in found] == pytest.approx(expected[range(4), [0, 5, 2, 2]].tolist(), abs=1e-5)
    assert all(len(top) == 6 for _, top in found)
    assert logprobs_of(logits[:0], [], 3) == []
    assert [top for _, top in logprobs_of(logits, [0, 1, 2, 3], 0)] == [{}] * 4


@pytest.mark.parametrize("vocab_size", [128, 256, 384, 1000, 32000])
def test_argmax_is_torchs(vocab_size: int) -> None:
    """Also on ties, NaN and infinities."""
    for num_rows in (1, 3, 17):
        plain = torch.randn(num_rows, vocab_size)
        ties, nan, inf = plain.round(), plain.clone(), plain.clone()
        nan[0, torch.randint(vocab_size, (2,))] = torch.nan
        inf[-1, torch.randint(vocab_size, (2,))] = torch.inf
        nothing = torch.full_like(plain, -torch.inf)
        for scores in (plain, ties, nan, inf, nothing, torch.zeros_like(plain)):
            assert torch.equal(_first_of_highest(scores), scores.argmax(dim=-1))
