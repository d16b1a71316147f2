"""What changes single logits of a row before a token is chosen, and what may go wrong there."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from hf_accel.engine.logits_filters import filter_logits
from hf_accel.sampling_params import SamplingParams

from .sampler_rows import make_row, sample

# -- edits --


@pytest.mark.parametrize("penalty", [0.5, 1.2, 5.0])
def test_repetition_penalty_is_hfs(penalty):
    logits = torch.randn(1, 30)
    ids = [3, 3, 7, 29, 0, 7]
    seen = []

    def spy(scores, params):
        seen.append(scores.clone())
        return filter_logits(scores, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_accel.engine.sampler.filter_logits", spy)
        sample(logits, make_row(SamplingParams(repetition_penalty=penalty), ids, num_prompt_tokens=4))
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits)
    assert torch.equal(seen[0], expected)


def test_repetition_penalty_ignores_ids_without_a_logit():
    logits = torch.tensor([[1.0, 1.5, -1.0]])
    row = make_row(SamplingParams(temperature=0, repetition_penalty=2.0), token_ids=[1, 500])
    assert sample(logits, row)[0].token_id == 0


def test_presence_and_frequency_penalties_count_the_output_only():
    logits = torch.tensor([[5.0, 4.0, 3.0, 0.0]])
    prompt = [0, 0, 0]
    presence = SamplingParams(temperature=0, presence_penalty=1.5)
    frequency = SamplingParams(temperature=0, frequency_penalty=0.6)
    assert sample(logits, make_row(presence, prompt))[0].token_id == 0
    assert sample(logits, make_row(presence, [*prompt, 0]))[0].token_id == 1
    assert sample(logits, make_row(presence, [*prompt, 0, 0, 0, 1]))[0].token_id == 0  # 3.5, 2.5, 3
    assert sample(logits, make_row(frequency, [*prompt, 0]))[0].token_id == 0
    assert sample(logits, make_row(frequency, [*prompt, 0, 0]))[0].token_id == 1
    assert sample(logits, make_row(frequency, [*prompt, 0, 0, 0, 0, 1, 1]))[0].token_id == 2  # 2.6, 2.8, 3


def test_penalties_of_a_row_kept_from_step_to_step():
    params = SamplingParams(temperature=0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2)
    kept = make_row(params, [3, 3, 700], num_prompt_tokens=3)
    for step in range(30):
        logits = torch.randn(1, 12)
        fresh = make_row(params, kept.token_ids, num_prompt_tokens=3)
        token = sample(logits, fresh)[0]
        assert sample(logits, kept)[0] == token
        kept.token_ids.append(token.token_id)
        if step == 20:
            del kept.token_ids[10:]  # rewound


def test_logit_bias():
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    assert sample(logits, make_row(SamplingParams(temperature=0, logit_bias={2: 3.0, 0: -1.0})))[0].token_id == 2
    banned = SamplingParams(temperature=0, logit_bias={0: -math.inf})
    assert sample(logits, make_row(banned))[0].token_id == 1


def test_min_tokens_masks_eos_and_stop_ids_until_reached():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[1])
    for num_output, expected in ((0, 2), (1, 2), (2, 0), (3, 0)):
        row = make_row(params, [9, 9, *[2] * num_output], num_prompt_tokens=2, eos=[0])
        assert sample(logits, row)[0].token_id == expected


def test_processors_run_first_in_order_and_see_the_history():
    calls = []

    def first(token_ids, scores):
        calls.append((list(token_ids), scores.clone()))
        token_ids.append(99)  # a copy: must not reach the request
        return torch.zeros_like(scores).index_fill(0, torch.tensor([2, 3]), 1.0)

    def second(token_ids, scores):
        calls.append((list(token_ids), scores.clone()))
        scores[2] += 1.0  # in place is fine too
        return scores

    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    row = make_row(
        SamplingParams(temperature=0, logits_processors=[first, second], logit_bias={3: 2.0}), token_ids=[7, 8]
    )
    assert sample(logits, row)[0].token_id == 3
    assert calls[0][0] == [7, 8] == calls[1][0] == row.token_ids
    assert torch.equal(calls[0][1], torch.tensor([5.0, 4.0, 3.0, 2.0])) and torch.equal(logits[0], calls[0][1])
    assert calls[1][1].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_processors_own_tensor_is_not_written():
    kept = torch.tensor([1.0, 0.0, 0.0])
    row = make_row(SamplingParams(temperature=0, logits_processors=[lambda ids, s: kept], logit_bias={0: -5.0}))
    sample(torch.zeros(1, 3), row)
    assert kept.tolist() == [1.0, 0.0, 0.0]


# -- bad rows --


# -- bad rows --


def _raise(token_ids, scores):
    raise KeyError("mine")


def test_an_error_stays_in_its_row():
    logits = torch.randn(8, 20)
    logits[1, 4] = torch.nan
    logits[2] = torch.nan
    logits[7, 3] = torch.inf
    rows = [
        make_row(SamplingParams(temperature=0)),
        make_row(SamplingParams(temperature=0)),
        make_row(SamplingParams(top_p=0.5, top_k=3, min_p=0.1)),
        make_row(SamplingParams(temperature=0, logits_processors=[_raise])),
        make_row(SamplingParams(logits_processors=[lambda ids, s: s[:3]])),
        make_row(SamplingParams(logits_processors=[lambda ids, s: s - torch.inf])),
        make_row(SamplingParams(logit_bias={20: 1.0}, logprobs=1)),
        make_row(SamplingParams()),
    ]
    good = sample(logits[:1], rows[0])[0]
    results = sample(logits, *rows)
    assert results[0] == good
    assert all(r.token_id == -1 and r.logprob is None for r in results[1:])
    messages = ["NaN logits", "NaN logits", "mine", "shape", "no token", "logit_bias names token id 20", "infinite"]
    for result, message in zip(results[1:], messages, strict=True):
        assert message in str(result.error)
    assert isinstance(results[3].error, KeyError)
    assert all(isinstance(r.error, ValueError) for i, r in enumerate(results) if i not in (0, 3))


def test_a_processor_may_repair_nan():
    logits = torch.tensor([[torch.nan, 1.0, 0.0]])
    row = make_row(SamplingParams(temperature=0, logits_processors=[lambda ids, s: s.nan_to_num(-1.0)]))
    assert sample(logits, row)[0].token_id == 1
