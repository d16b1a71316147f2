"""Launches of the penalty kernels to compile."""

from __future__ import annotations

import torch

from hf_accel_kernels.triton_ops import penalties

from .chips import Case

VOCAB = 128256


def _all() -> None:
    logits, table = torch.empty(2, VOCAB), torch.empty(4, VOCAB, dtype=torch.int16)
    rows, numbers = torch.zeros(2, dtype=torch.int32), torch.ones(2)
    penalties.count_tokens(table, rows, torch.zeros(2, dtype=torch.int64))
    penalties.apply_penalties(logits, table, rows, numbers, numbers, numbers)
    penalties.add_to_logits(logits, torch.zeros(2, 300, dtype=torch.int32), torch.zeros(2, 300))


CASES = {"counted, applied, added": Case(_all)}
