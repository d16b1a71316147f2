"""RMSNorm, alone and after a residual sum, rounded as HF's `LlamaRMSNorm`: the typed contract, its checks and its forms.

The scaling (Zhang and Sennrich, arXiv 1910.07467) is computed in float32 and rounded to the model's dtype before it meets the
weight; the residual sum is rounded to that dtype before it is normed. Knows tensors only.
"""

from __future__ import annotations

import torch

from .triton_ops.launch import why_not

WIDEST_TRITON_ROW = 32768
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows scaled to unit mean square, times the weight. No host sync.

    Args:
        x: [num_tokens, hidden_size], float32, bfloat16 or float16, last axis dense.
        weight: [hidden_size], contiguous, x's dtype.
        eps: added to the mean square.

    Returns:
        [num_tokens, hidden_size] of x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check(x, weight)
    if _has_triton_form(x):
        from .triton_ops import rms_norm as kernels

        return kernels.rms_norm(x, weight, eps)
    return _rms_norm_in_torch(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a block's output and the residual stream, and its norm, in one pass. No host sync.

    Args:
        x: [num_tokens, hidden_size], float32, bfloat16 or float16, last axis dense.
        residual: the same, of its own row stride.
        weight: [hidden_size], contiguous, x's dtype.
        eps: added to the mean square.
        scale: factor on x, whose product is rounded before the sum (Granite's residual multiplier).

    Returns:
        (normed, new residual), each [num_tokens, hidden_size] of x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1:
        raise ValueError(
            f"residual must be {tuple(x.shape)} of {x.dtype}, dense in the last axis, got {tuple(residual.shape)} {residual.dtype}"
        )
    if _has_triton_form(x):
        from .triton_ops import rms_norm as kernels

        return kernels.add_rms_norm(x, residual, weight, eps, scale)
    return _add_rms_norm_in_torch(x, residual, weight, eps, scale)


def _rms_norm_in_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _add_rms_norm_in_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + (x if scale == 1.0 else x * scale)
    return _rms_norm_in_torch(total, weight, eps), total


def _has_triton_form(x: torch.Tensor) -> bool:
    return x.shape[1] <= WIDEST_TRITON_ROW and not why_not(x.device)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES or x.stride(1) != 1:
        raise ValueError(
            f"x must be floats [num_tokens, hidden_size], dense in the last axis, got {tuple(x.shape)} {x.dtype}"
        )
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight must be [{x.shape[1]}] of {x.dtype}, contiguous, got {tuple(weight.shape)} {weight.dtype}"
        )
