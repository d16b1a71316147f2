"""Launches of the kernels on rows in token automata to compile."""

from __future__ import annotations

import torch

from hf_accel_kernels.triton_ops.token_states import advance, mask_rows

from .chips import Case


def _arena() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    states, tokens = torch.zeros(32, dtype=torch.int64), torch.zeros(32, dtype=torch.int64)
    return states, tokens, torch.zeros(300, 7, dtype=torch.int64)


def _mask_rows() -> None:
    states, _, arena = _arena()
    mask_rows(states, arena, torch.zeros(300, dtype=torch.int32))


def _advance() -> None:
    states, tokens, arena = _arena()
    advance(states, tokens, arena, torch.zeros(2, 128256, dtype=torch.int32), torch.zeros(9000, 2, dtype=torch.int32))


CASES = {"mask rows": Case(_mask_rows), "advance": Case(_advance)}
