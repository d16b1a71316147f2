"""Sampling: the kernels and the torch form against the oracle, and the oracle against HuggingFace's warpers."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import pytest
import torch
from transformers.generation import logits_process as hf

from hf_accel_kernels import reference_sampling as reference
from hf_accel_kernels import sampling, token_bitmask
from hf_accel_kernels.triton_ops import argmax as argmax_kernel
from hf_accel_kernels.triton_ops import sampling as kernel

ROUNDING = 3e-6  # nearer than this to a sum, float32 may decide otherwise than the oracle
SMALL = kernel.Config(
    group=8, groups_of_block=4, groups_at_once=16
)  # several blocks of a small row, several lists of them


def uneven(vocab_size: int) -> torch.Tensor:
    return torch.randn(vocab_size) * 3


def tied(vocab_size: int) -> torch.Tensor:
    return (torch.randn(vocab_size) * 2).round() / 2


def flat(vocab_size: int) -> torch.Tensor:
    return torch.full((vocab_size,), -3.0)


def clustered(vocab_size: int) -> torch.Tensor:
    """The likeliest tokens are neighbours, as in vocabularies that are sorted by frequency."""
    return -torch.arange(vocab_size) / 3 + torch.randn(vocab_size) / 5


def sparse(vocab_size: int) -> torch.Tensor:
    return torch.where(torch.rand(vocab_size) < 0.8, -torch.inf, torch.randn(vocab_size)).index_fill(
        0, torch.tensor([5]), 1.0
    )


def around_zero(vocab_size: int) -> torch.Tensor:
    return torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-3])[torch.randint(5, (vocab_size,))]


@dataclass
class Batch:
    """Rows of logits and their settings."""

    logits: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor

    def settings(self, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Everything but the logits, of some of the rows."""
        values = [self.temperature, self.top_k, self.top_p, self.min_p, self.uniform]
        return values if rows is None else [x[rows] for x in values]

    def scores(self, row: int) -> list[float]:
        """As floats, divided in float32."""
        return (self.logits[row].float() / self.temperature[row]).tolist()


def make_batch(vocab_size: int, kinds: list, seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    settings = [
        (
            rng.choice([1.0, 0.3, 0.7, 1.7]),
            rng.choice([0, 0, 1, 5, 50, vocab_size - 1, 10 * vocab_size]),
            rng.choice([1.0, 0.05, 0.5, 0.9, 0.999]),
            rng.choice([0.0, 0.0, 0.05, 0.4, 1.0]),
        )
        for _ in kinds
    ]
    temperature, top_k, top_p, min_p = zip(*settings)
    return Batch(
        torch.stack([kind(vocab_size) for kind in kinds]).to(dtype),
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p),
        torch.tensor(min_p),
        torch.tensor([rng.choice([0.0, 1 - 2.0**-53, rng.random(), rng.random()]) for _ in kinds], dtype=torch.float64),
    )


def run(batch: Batch, device: torch.device, config: kernel.Config = SMALL, **masks: torch.Tensor) -> kernel.Sampled:
    settings = [x.to(device) for x in batch.settings()]
    moved = [None if masks.get(name) is None else masks[name].to(device) for name in ("bitmask", "mask_rows")]
    result = kernel.sample(batch.logits.to(device), *settings, *moved, config=config)
    return kernel.Sampled(*(x.cpu() for x in vars(result).values()))


def kept_by(result: kernel.Sampled, batch: Batch, row: int) -> list[int]:
    """The tokens that could have been chosen, by the edge that the kernel found."""
    scores = torch.tensor(batch.scores(row))
    edge, first = result.edge_scores[row], result.edge_tokens[row]
    kept = (scores > edge) | ((scores == edge) & (torch.arange(len(scores)) >= first))
    return (kept & ((scores - scores.max()).exp() >= batch.min_p[row])).nonzero()[:, 0].tolist()


KINDS = [uneven, tied, flat, clustered, sparse, around_zero]


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "config"),
    [
        (37, torch.float32, SMALL),
        (230, torch.float32, SMALL),
        (201, torch.bfloat16, SMALL),
        (5003, torch.float32, kernel.DEFAULT),
    ],
)
def test_kernel_keeps_and_draws_what_the_oracle_does(vocab_size, dtype, config, device):
    num_compared = 0
    batches = [make_batch(vocab_size, KINDS, vocab_size + seed, dtype) for seed in range(2)]
    for batch in batches:
        result = run(batch, device, config)
        assert result.valid.all()
        for row in range(len(KINDS)):
            scores = batch.scores(row)
            top_k, top_p, min_p = int(batch.top_k[row]), float(batch.top_p[row]), float(batch.min_p[row])
            kept, nearest = reference.kept_tokens(scores, top_k, top_p, min_p)
            if nearest < ROUNDING:
                continue
            if 0 < top_k < vocab_size or top_p < 1.0 or min_p > 0.0:
                assert kept_by(result, batch, row) == kept
            token, nearest = reference.draw(scores, kept, float(batch.uniform[row]))
            if nearest >= ROUNDING or batch.uniform[row] in (0.0, 1 - 2.0**-53):
                assert result.token_ids[row] == token
                num_compared += 1
    assert num_compared >= 0.75 * len(batches) * len(KINDS)


@pytest.mark.parametrize("vocab_size", [37, 300, 1003])
def test_torch_form_draws_what_the_oracle_does(vocab_size):
    num_compared = 0
    for seed in range(20):
        batch = make_batch(vocab_size, KINDS, seed)
        token_ids, valid = sampling.sample(batch.logits, *batch.settings())
        assert valid.all()
        for row in range(len(KINDS)):
            scores = batch.scores(row)
            kept, nearest = reference.kept_tokens(
                scores, int(batch.top_k[row]), float(batch.top_p[row]), float(batch.min_p[row])
            )
            token, near_number = reference.draw(scores, kept, float(batch.uniform[row]))
            if min(nearest, near_number) >= ROUNDING:
                assert token_ids[row] == token
                num_compared += 1
    assert num_compared > 60


@pytest.mark.parametrize("vocab_size", [37, 300, 1003])
def test_oracle_keeps_what_hf_keeps(vocab_size, monkeypatch):
    """Where HF leaves a choice between equal scores to its sort, with a stable one."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
    num_compared = 0
    for seed in range(30):
        batch = make_batch(vocab_size, KINDS, seed)
        for row in range(len(KINDS)):
            scores = torch.tensor([batch.scores(row)])
            top_k, top_p, min_p = int(batch.top_k[row]), float(batch.top_p[row]), float(batch.min_p[row])
            kept, nearest = reference.kept_tokens(scores[0].tolist(), top_k, top_p, min_p)
            if nearest < 1e-5:  # HF adds up in float32, one by one
                continue
            for warper in (
                hf.TopKLogitsWarper(top_k) if top_k else None,
                hf.TopPLogitsWarper(top_p) if top_p < 1.0 else None,
                hf.MinPLogitsWarper(min_p) if min_p else None,
            ):
                scores = warper(None, scores) if warper else scores
            if any(scores[0, kept] == -torch.inf):  # tokens of no probability, which no draw can tell
                kept = [i for i in kept if batch.scores(row)[i] > -torch.inf]
            assert (scores[0] > -torch.inf).nonzero()[:, 0].tolist() == kept
            num_compared += 1
    assert num_compared > 90


def test_top_k_before_each_other_filter(device):
    """What the later filters need is listed, whatever the earlier ones drop."""
    settings = [
        (k, p, m) for k in (2, 3, 8, 40) for p, m in ((1.0, 0.0), (0.7, 0.0), (0.6, 0.3), (0.4, 0.5), (1.0, 0.2))
    ]
    top_k, top_p, min_p = (torch.tensor(x) for x in zip(*settings))
    num_rows = len(settings)
    uniform = torch.rand(num_rows, dtype=torch.float64)
    batch = Batch(torch.randn(num_rows, 90) * 1.5, torch.ones(num_rows), top_k.int(), top_p, min_p, uniform)
    result = run(batch, device)
    for row, (k, p, m) in enumerate(settings):
        kept, nearest = reference.kept_tokens(batch.scores(row), k, p, m)
        assert nearest < ROUNDING or kept_by(result, batch, row) == kept


def test_the_edge_of_top_k_is_the_very_quotient(device):
    """Rounded otherwise, scores would tie that do not, or the other way round."""
    num_rows, k = 12, 5
    settings = [torch.full((num_rows,), k, dtype=torch.int32), torch.ones(num_rows), torch.zeros(num_rows)]
    temperature, uniform = torch.rand(num_rows) + 0.3, torch.rand(num_rows, dtype=torch.float64)
    batch = Batch(torch.randn(num_rows, 90), temperature, *settings, uniform)
    quotients = batch.logits / temperature[:, None]
    assert torch.equal(run(batch, device).edge_scores, quotients.sort(dim=-1, descending=True).values[:, k - 1])


def test_a_row_does_not_depend_on_the_batch(device):
    batch = make_batch(300, KINDS, seed=7)
    alone = run(batch, device)
    order = torch.tensor([4, 1, 1, 5, 0, 3, 2])
    wide = torch.full((len(order), 311), torch.nan)
    wide[:, :300] = batch.logits[order]
    mixed = run(Batch(wide[:, :300], *batch.settings(order)), device)
    assert torch.equal(mixed.token_ids, alone.token_ids[order])
    assert torch.equal(mixed.edge_scores, alone.edge_scores[order])


def test_invalid_rows_and_greedy_ones_beside_others(device):
    logits = torch.randn(9, 70)
    logits[0, 60], logits[1], logits[2, 3] = torch.nan, -torch.inf, torch.inf
    logits[3, 60], logits[4], logits[5, 3] = torch.nan, -torch.inf, torch.inf
    logits[6, [69, 11, 40]] = 9.0
    logits[7] = torch.randn(70) * 1e34  # infinite once divided
    temperature = torch.tensor([1.0, 1, 1, 0, 0, 0, 1e-7, 1e-5, 1])
    expected = torch.tensor([False, False, False, False, False, True, True, False, True])
    for top_k in (0, 5):
        rows = [torch.full((9,), top_k, dtype=torch.int32), torch.ones(9), torch.zeros(9)]
        batch = Batch(logits, temperature, *rows, torch.rand(9, dtype=torch.float64))
        result = run(batch, device)
        token_ids, valid = sampling.sample(logits, *batch.settings())
        for ids, ok in ((result.token_ids, result.valid), (token_ids, valid)):
            assert torch.equal(ok, expected)
            assert ids[:5].tolist() == [0] * 5 and ids[5:8].tolist() == [3, 11, 0]
        assert result.token_ids[8] == token_ids[8]


def test_masks_act_before_everything(device):
    vocab_size, num_words = 300, 9  # tokens from 288 on have no word: forbidden
    batch = make_batch(vocab_size, KINDS, seed=11, dtype=torch.bfloat16)
    batch.temperature[2] = 0.0
    bitmask = torch.randint(-(1 << 31), 1 << 31, (3, num_words)).to(torch.int32)
    bitmask[:, 0] |= 1 << 5
    mask_rows = torch.tensor([0, -1, 2, 1, 0, 2], dtype=torch.int32)
    masked = batch.logits.clone()
    token_bitmask.apply_token_bitmask(masked, bitmask, mask_rows)
    expected = run(Batch(masked, *batch.settings()), device)
    result = run(batch, device, bitmask=bitmask, mask_rows=mask_rows)
    assert torch.equal(result.token_ids, expected.token_ids) and torch.equal(result.valid, expected.valid)
    in_torch, _ = sampling.sample(batch.logits, *batch.settings(), bitmask=bitmask, mask_rows=mask_rows)
    assert torch.equal(in_torch, expected.token_ids)
    own = bitmask[[0, 1, 2, 0, 1, 2]].contiguous()
    token_bitmask.apply_token_bitmask(masked, own)
    on_device = [batch.logits.to(device), own.to(device)]
    found, _ = argmax_kernel.argmax(*on_device, None, block=128)
    allowed = batch.logits.clone()
    token_bitmask.apply_token_bitmask(allowed, own)
    assert torch.equal(found.cpu(), allowed.argmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_argmax_is_the_first_of_the_highest(dtype, device):
    logits = (torch.randn(8, 333) * 2).round().to(dtype)
    logits[0, 300], logits[1], logits[2, 8], logits[3] = torch.nan, -torch.inf, torch.inf, 0.0
    logits[3, ::2] = -0.0
    expected = logits.float().numpy().argmax(axis=-1)
    ok = torch.tensor([reference.is_valid(row, greedy=True) for row in logits.float().tolist()])
    found = argmax_kernel.argmax(logits.to(device), None, None, block=64)
    for token_ids, valid in (found, sampling.argmax(logits)):
        assert torch.equal(valid.cpu(), ok) and ok.sum() == 6
        assert token_ids.tolist() == [int(x) if good else 0 for x, good in zip(expected, ok)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(dtype, device):
    logits = (torch.randn(4, 333) * 4).to(dtype)
    logits[1, :200] = -torch.inf
    token_ids = torch.tensor([0, 332, 64, 7])
    expected = [reference.logprob(row, i) for row, i in zip(logits.tolist(), token_ids.tolist())]
    own, log_total = argmax_kernel.logprobs(logits.to(device), token_ids.to(device), block=64)
    in_torch, values, ids = sampling.logprobs(logits, token_ids, top_n=3)
    torch.testing.assert_close(own.cpu(), torch.tensor(expected), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(in_torch, torch.tensor(expected), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(log_total.cpu(), logits.float().logsumexp(-1), rtol=1e-6, atol=2e-6)
    assert torch.equal(values.argsort(dim=-1, descending=True, stable=True), torch.arange(3).expand(4, 3))
    for row in range(4):
        best = [reference.logprob(logits[row].tolist(), i) for i in ids[row].tolist()]
        torch.testing.assert_close(values[row], torch.tensor(best), rtol=1e-6, atol=2e-6)
    assert sampling.logprobs(logits, token_ids, top_n=400)[1].shape == (4, 333)
    assert sampling.logprobs(logits, token_ids)[1].shape == (4, 0)


def test_bad_input_is_refused():
    batch = make_batch(40, KINDS, seed=0)
    settings = batch.settings()
    for place, wrong in enumerate(
        [torch.ones(6, dtype=torch.float64), torch.ones(6), torch.ones(5), torch.ones(6, 1), torch.ones(6)]
    ):
        with pytest.raises(ValueError, match="must be"):
            sampling.sample(batch.logits, *settings[:place], wrong, *settings[place + 1 :])
    with pytest.raises(ValueError, match="contiguous"):
        sampling.sample(batch.logits, torch.ones(12)[::2], *settings[1:])
    with pytest.raises(ValueError, match="dense"):
        sampling.argmax(torch.zeros(8, 2).T)
    with pytest.raises(ValueError, match="mask_rows"):
        sampling.argmax(batch.logits, mask_rows=torch.zeros(6, dtype=torch.int32))
    with pytest.raises(ValueError, match="masks"):
        sampling.argmax(batch.logits, bitmask=torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="token_ids"):
        sampling.logprobs(batch.logits, torch.zeros(6, dtype=torch.int32))
