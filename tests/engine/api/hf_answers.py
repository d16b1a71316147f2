"""What an HF forward says, and the calls and settings that it is compared with."""

from __future__ import annotations

import torch

from hf_accel import SamplingParams
from hf_accel.config import FaultInjection

CONFIG = {"num_pages": 256, "page_size": 8, "faults": FaultInjection(check_integrity=True)}


def ids_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def hf_greedy(model, ids: list[int], count: int) -> list[int]:
    return model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)[0, len(ids) :].tolist()


@torch.no_grad()
def hf_logprobs(model, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab_size]: row i predicts token i + 1."""
    return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def greedy(count: int = 8, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, **options)
