"""SamplingParams: bad values are refused with the allowed range; what counts as greedy."""

from __future__ import annotations

import dataclasses
import math

import pytest

from hf_accel.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("n", 0, "at least 1"),
        ("temperature", -0.1, r"0 \(greedy\) or more"),
        ("temperature", math.inf, r"0 \(greedy\) or more"),
        ("temperature", math.nan, r"0 \(greedy\) or more"),
        ("top_k", -1, r"0 \(off\) or more"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.1, r"in \(0, 1\]"),
        ("top_p", math.nan, r"in \(0, 1\]"),
        ("min_p", -0.1, r"in \[0, 1\]"),
        ("min_p", 1.1, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, "more than 0"),
        ("repetition_penalty", -1.0, "more than 0"),
        ("presence_penalty", math.nan, "finite"),
        ("frequency_penalty", math.inf, "finite"),
        ("max_tokens", -1, "0 or more, or None"),
        ("min_tokens", -1, "0 or more"),
        ("logprobs", -1, "0 or more, or None"),
        ("prompt_logprobs", -1, "0 or more, or None"),
        ("stop", ("a", ""), "non-empty strings"),
    ],
)
def test_bad_value_names_itself_and_the_range(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be {allowed}, got "):
        SamplingParams(**{name: value})


def test_min_tokens_cannot_exceed_max_tokens():
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens=3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)
    assert SamplingParams(max_tokens=None, min_tokens=4).min_tokens == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("top_p", 1.0),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("max_tokens", 0),
        ("logprobs", 0),
        ("n", 1),
    ],
)
def test_the_edges_are_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_sequences_become_tuples():
    params = SamplingParams(stop="END", stop_token_ids=[1, 2], logits_processors=[print])
    assert (params.stop, params.stop_token_ids, params.logits_processors) == (("END",), (1, 2), (print,))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0


@pytest.mark.parametrize(
    ("params", "greedy", "plain"),
    [
        (SamplingParams(), False, False),
        (SamplingParams(temperature=0), True, True),
        (SamplingParams(top_k=1), True, True),
        (SamplingParams(temperature=0, repetition_penalty=1.1), True, False),
        (SamplingParams(temperature=0, presence_penalty=0.1), True, False),
        (SamplingParams(temperature=0, frequency_penalty=0.1), True, False),
        (SamplingParams(temperature=0, min_tokens=1), True, False),
        (SamplingParams(temperature=0, logprobs=0), True, False),
        (SamplingParams(temperature=0, logit_bias={1: 1.0}), True, False),
        (SamplingParams(temperature=0, logits_processors=[print]), True, False),
        (SamplingParams(temperature=0, top_p=0.5, min_p=0.1, stop="x"), True, True),
    ],
)
def test_greedy(params, greedy, plain):
    assert (params.greedy, params.plain_greedy) == (greedy, plain)
