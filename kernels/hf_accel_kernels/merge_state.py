"""Attention over one context computed in two parts, merged: the typed contract, its checks and which form computes it.

For contexts whose front many sequences share: attend to that once for all of them, to the rest for each, and merge (cascade
inference; the algebra is Flash-Attention's, arXiv 2205.14135). Knows tensors only.
"""

from __future__ import annotations

import torch

from .triton_ops.launch import why_not


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over both parts' keys, from each part's result and natural log of its sum of exponentials. No host sync.

    Args:
        out_a: [num_tokens, num_heads, v_head_dim], float32, bfloat16 or float16, last axis dense.
        lse_a: [num_tokens, num_heads] float32, as `ops.paged_attention` writes it; -inf for a part without keys. A sink may
            be in one part only.
        out_b: as out_a, of its dtype.
        lse_b: as lse_a.

    Returns:
        The merged result, of out_a's dtype, and its log of the sum of exponentials; zeros and -inf where neither has keys.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    if out_a.ndim != 3 or out_a.shape != out_b.shape or out_a.dtype != out_b.dtype or not out_a.is_floating_point():
        raise ValueError(
            f"out_a and out_b must be floats [num_tokens, num_heads, v_head_dim] alike, got {tuple(out_a.shape)} "
            f"{out_a.dtype} and {tuple(out_b.shape)} {out_b.dtype}"
        )
    if out_a.stride(2) != 1 or out_b.stride(2) != 1:
        raise ValueError("out_a and out_b must be dense in the last axis")
    for lse in (lse_a, lse_b):
        if lse.shape != out_a.shape[:2] or lse.dtype != torch.float32:
            raise ValueError(f"lse must be float32 {tuple(out_a.shape[:2])}, got {tuple(lse.shape)} {lse.dtype}")
    if why_not(out_a.device):
        return _merge_in_torch(out_a, lse_a, out_b, lse_b)
    from .triton_ops import merge_state as kernel

    return kernel.merge_state(out_a, lse_a, out_b, lse_b)


def _merge_in_torch(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - finite)[..., None], torch.exp(lse_b - finite)[..., None]
    return (out_a.float() * weight_a + out_b.float() * weight_b).to(out_a.dtype), lse
