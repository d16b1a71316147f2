"""The sampler's form that waits for nothing: the same choices as `sample`, also while the host lags behind."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from hf_accel.engine.sampler import Sampler
from hf_accel.sampling_params import SamplingParams

from .sampler_rows import make_row

VOCAB_SIZE = 83


def random_params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=draw.choice((0, 0.7, 1.0, 1.6)),
        top_k=draw.choice((0, 0, 5)),
        top_p=draw.choice((1.0, 0.8)),
        min_p=draw.choice((0.0, 0.1)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.4)),
        frequency_penalty=draw.choice((0.0, 0.0, 0.7)),
        presence_penalty=draw.choice((0.0, 0.3)),
        logit_bias=draw.choice((None, None, {3: 4.0, 80: -9.0})),
        min_tokens=draw.choice((0, 0, 3)),
        logprobs=draw.choice((None, None, 0, 4)),
        stop_token_ids=(1, 2),
        max_tokens=9,
    )


@pytest.mark.parametrize("num_rows", [1, 2, 7, 33])
def test_steps_ahead_choose_what_steps_in_turn_choose(num_rows: int) -> None:
    draw = random.Random(num_rows)
    generator = torch.Generator().manual_seed(num_rows)
    in_turn = [
        make_row(random_params(draw), [draw.randrange(VOCAB_SIZE) for _ in range(5)], 4, seed=i, eos=(0,))
        for i in range(num_rows)
    ]
    ahead = copy.deepcopy(in_turn)
    steps = [torch.randn(num_rows, VOCAB_SIZE, generator=generator) * 4 for _ in range(5)]
    sampler, late = Sampler(), []
    for number, logits in enumerate(steps):
        late.append(sampler.begin(logits, ahead, [5 + number] * num_rows, ahead=True).to_host())
        if number:  # the tokens of the step before are known only now
            for row, token in zip(ahead, late[-2].finish(), strict=True):
                row.token_ids.append(token.token_id)
        expected = sampler.sample(logits, in_turn)
        assert late[-1].finish() == expected
        for row, token in zip(in_turn, expected, strict=True):
            row.token_ids.append(token.token_id)
    assert [row.token_ids[:-1] for row in in_turn] == [row.token_ids for row in ahead]


def test_a_step_taken_back_is_counted_anew() -> None:
    row = make_row(SamplingParams(temperature=0, frequency_penalty=100.0), [5, 6], 2)
    sampler, logits = Sampler(), torch.zeros(1, 9)
    logits[0, 3], logits[0, 4] = 2.0, 1.0
    other = torch.zeros(1, 9)
    other[0, 7] = 9.0
    assert sampler.begin(other, [row], [2], ahead=True).finish()[0].token_id == 7  # taken back
    assert sampler.begin(other, [row], [3], ahead=True).finish()[0].token_id == 0
    assert sampler.sample(logits, [row])[0].token_id == 3
    row.token_ids.append(3)
    assert sampler.sample(logits, [row])[0].token_id == 4
    assert sampler.sample(other, [row])[0].token_id == 7


def test_errors_are_their_rows_own_without_the_logits() -> None:
    logits = torch.randn(5, VOCAB_SIZE)
    logits[1, 8], logits[2], logits[3, 7] = float("nan"), -float("inf"), float("inf")
    blocked = SamplingParams(logprobs=2, logit_bias=dict.fromkeys(range(VOCAB_SIZE), -float("inf")))
    rows = [make_row(p, seed=3) for p in (SamplingParams(logprobs=1), *[SamplingParams(temperature=0)] * 3, blocked)]
    batch = Sampler().begin(logits, rows, [3] * 5, ahead=True)
    kept = batch.to_host()
    assert kept.logits is None
    for tokens in (batch.finish(), kept.finish()):
        assert tokens[0].error is None and len(tokens[0].top_logprobs) == 1
        words = ("NaN logits", "infinite logits", "every logit is -inf")
        for token, word in zip((tokens[1], tokens[2], tokens[4]), words, strict=True):
            assert token.token_id == -1 and word in str(token.error)
    assert all(0 <= i < VOCAB_SIZE for i in batch.token_ids.tolist())  # the next step may be fed with any of them


def test_a_bad_parameter_is_its_rows_own_error() -> None:
    rows = [make_row(SamplingParams(temperature=0)), make_row(SamplingParams(logit_bias={99: 1.0}))]
    good, bad = Sampler().begin(torch.randn(2, 9), rows, [3, 3], ahead=True).to_host().finish()
    assert good.error is None and "99" in str(bad.error)
