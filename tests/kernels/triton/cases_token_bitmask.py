"""Launches of the token mask kernel to compile."""

from __future__ import annotations

import torch

from hf_accel_kernels.triton_ops.token_bitmask import apply_token_bitmask

from .chips import Case


def _apply(dtype: torch.dtype, named: bool) -> None:
    logits, bitmask = torch.empty(2, 128256, dtype=dtype), torch.empty(2, 4008, dtype=torch.int32)
    apply_token_bitmask(logits, bitmask, torch.zeros(2, dtype=torch.int32) if named else None)


CASES = {
    "fp32": Case(lambda: _apply(torch.float32, named=False)),
    "bf16 by row": Case(lambda: _apply(torch.bfloat16, named=True)),
}
