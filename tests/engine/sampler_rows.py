"""Rows for the sampler's tests."""

from __future__ import annotations

import torch

from hf_accel.engine.logits_edits import SamplingRow
from hf_accel.engine.sampled import SampledToken
from hf_accel.engine.sampler import Sampler
from hf_accel.sampling_params import SamplingParams


def make_row(params: SamplingParams, token_ids=(1, 2, 3), num_prompt_tokens=3, seed=0, eos=()) -> SamplingRow:
    return SamplingRow(params, list(token_ids), num_prompt_tokens, seed, frozenset(eos))


def sample(logits: torch.Tensor, *rows: SamplingRow) -> list[SampledToken]:
    return Sampler().sample(logits, rows)
