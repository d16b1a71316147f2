"""What the sampler does on a device: the tokens that it chooses on the host, and no wait in between."""

from __future__ import annotations

import random

import pytest
import torch

from hf_accel.engine import sampler as sampler_module
from hf_accel.engine.device_sampling import choose, settings_on
from hf_accel.engine.inverse_cdf import uniform
from hf_accel.sampling_params import SamplingParams

from .sampler_rows import make_row, sample

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]


def _params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 1.0, 0.3, 1.7]),
        top_k=rng.choice([0, 0, 1, 5, 50, 1 << 40]),
        top_p=rng.choice([1.0, 0.05, 0.5, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.3]),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [7, 300, 1000])
def test_device_and_host_choose_the_same_tokens(vocab_size, device):
    rng = random.Random(vocab_size)
    for num_rows in (1, 6, 40):
        rows = [
            make_row(_params(rng), token_ids=range(rng.randrange(9)), seed=rng.randrange(1 << 70))
            for _ in range(num_rows)
        ]
        logits = torch.randn(num_rows, vocab_size) * rng.choice([0.5, 3.0])
        logits[-1, 3:] = torch.nan if num_rows == 6 else logits[-1, 3:]
        numbers = [uniform(row.seed, len(row.token_ids)) for row in rows]
        token_ids, valid = choose(logits.to(device), [row.params for row in rows], numbers)
        for i, token in enumerate(sample(logits, *rows)):
            assert bool(valid[i]) == (token.error is None)
            assert int(token_ids[i]) == max(token.token_id, 0)


def test_settings_reach_the_device_as_they_are():
    params = [
        SamplingParams(temperature=0.3, top_k=7, top_p=0.9, min_p=0.1),
        SamplingParams(top_k=1),
        SamplingParams(top_k=1 << 40),
    ]
    temperature, top_k, top_p, min_p, number = settings_on(torch.device("cpu"), params, [0.1, 0.2, 1 - 2.0**-53])
    assert torch.equal(temperature, torch.tensor([0.3, 0.0, 1.0]))
    assert top_k.tolist() == [7, 1, (1 << 31) - 1]
    assert torch.equal(top_p, torch.tensor([0.9, 1.0, 1.0])) and torch.equal(min_p, torch.tensor([0.1, 0.0, 0.0]))
    assert number.tolist() == [0.1, 0.2, 1 - 2.0**-53]


@pytest.mark.gpu
@NEEDS_CUDA
def test_sampler_uses_the_device_form_which_waits_for_nothing(monkeypatch):
    called = []

    def watched(*args):
        called.append(args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return choose(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(sampler_module, "choose", watched)
    logits = torch.randn(3, 500) * 3
    params = [SamplingParams(top_p=0.9), SamplingParams(temperature=0), SamplingParams()]
    rows = [make_row(p, seed=i) for i, p in enumerate(params)]
    assert sample(logits.cuda(), *rows) == sample(logits, *rows)
    assert len(called) == 1
