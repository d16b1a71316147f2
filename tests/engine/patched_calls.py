"""One greedy call on a patched model, for tests of what surrounds it."""

from __future__ import annotations

import torch

import hf_accel

CONFIG = {"num_pages": 128, "page_size": 8}
PROMPT = torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(3))
LENGTH = 8


def tokens(model, **options) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": LENGTH} | options
    return model.generate(input_ids=PROMPT, **options)[:, PROMPT.shape[1] :].tolist()


def reasons(model) -> dict[str, int]:
    return hf_accel.get_engine(model).stats().fallback_reasons
