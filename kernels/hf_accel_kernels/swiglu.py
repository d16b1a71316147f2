"""The gated activation of Llama-like MLPs, silu(gate) * up, rounded as HF's: the typed contract, its checks and its forms."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .triton_ops.launch import why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202); silu in float32, rounded before the product. No host sync.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], float32, bfloat16 or float16, last axis dense: a row's gates, then its ups.

    Returns:
        [num_tokens, intermediate_size] of gate_up's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in DTYPES or gate_up.stride(1) != 1:
        raise ValueError(
            "gate_up must be floats [num_tokens, 2 * intermediate_size], dense in the last axis, "
            f"got {tuple(gate_up.shape)} {gate_up.dtype}"
        )
    if why_not(gate_up.device):
        return _swiglu_in_torch(gate_up)
    from .triton_ops import swiglu as kernel

    return kernel.swiglu(gate_up)


def _swiglu_in_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up
