"""The fused CPU ops in plain PyTorch: slow, right, and the oracle of their tests. Knows tensors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def linear_reference(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    epilogue: str = "plain",
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The chain of tensor operations that `packed_linear` fuses.

    Args:
        x: [M, K].
        weights: [N_i, K] each; for epilogue "silu_mul" the gate and the up projection.
        biases: [N_i] each, or None.
        residual: [M, N], or [M, N / 2] for "silu_mul".

    Returns:
        [M, N] or [M, N / 2] of x's dtype.
    """
    biases = [None] * len(weights) if biases is None else biases
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    out = F.silu(parts[0]) * parts[1] if epilogue == "silu_mul" else torch.cat(parts, dim=1)
    if scale != 1.0:
        out = out * scale
    return out if residual is None else residual + out
