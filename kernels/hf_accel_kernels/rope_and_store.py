"""What lies between the qkv product and attention, in one pass: head norms, rotary embedding, keys and values into pages.

The typed contract, its checks and its forms. Rounded as HF's Llama-like attention: every product and sum in the model's
dtype. Knows tensors only.
"""

from __future__ import annotations

import torch

from . import ops
from .rms_norm import DTYPES, _rms_norm_in_torch
from .triton_ops.launch import why_not


def split_qkv(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views [num_tokens, num_heads or num_kv_heads, head_dim] of packed rows [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return q, k, v


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and rotate queries and keys (Su et al., arXiv 2104.09864, the half-split form), store keys and values. No host sync.

    Args:
        q: [num_tokens, num_heads, head_dim], float32, bfloat16 or float16, last axis dense; views of packed rows will do.
        k: [num_tokens, num_kv_heads, head_dim], likewise.
        v: [num_tokens, num_kv_heads, v_head_dim], likewise.
        positions: [num_tokens] int64, contiguous, all below max_positions (not checked).
        cos: [max_positions, rotary_dim] float32, contiguous, rotary_dim even and at most head_dim; rounded to q's dtype before
            use. None, with sin: no rotation.
        sin: the same.
        k_pages: [num_pages, num_kv_heads, page_size, head_dim], contiguous, q's dtype, or float8_e4m3fn with scales; written.
        v_pages: [num_pages, num_kv_heads, page_size, v_head_dim], likewise; written.
        slot_mapping: [num_tokens] int64, page * page_size + offset; a negative slot stores nothing.
        q_norm: [head_dim], contiguous, q's dtype: weight of an RMSNorm over each query head, before the rotation; or None.
        k_norm: the same for keys; given exactly when q_norm is.
        eps: of the norms.
        k_scales: [num_pages, num_kv_heads, page_size] float32, contiguous, for fp8 pages; see `ops.store_kv`.
        v_scales: the same for values.
        out: like q, to write the queries to: q itself will do. None: a new tensor.

    Returns:
        out: [num_tokens, num_heads, head_dim].

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    ops.check_store(k, v, k_pages, v_pages, slot_mapping, k_scales, v_scales)
    _check_heads(q, k, v, out)
    _check_tables(q, positions, cos, sin)
    _check_norms(q, q_norm, k_norm)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pages, scales, norms = (k_pages, v_pages, slot_mapping), (k_scales, v_scales), (q_norm, k_norm, eps)
    if why_not(q.device):
        _in_torch(q, k, v, positions, cos, sin, *pages, *norms, *scales, out)
    else:
        from .triton_ops import rope_and_store as kernel

        kernel.rope_and_store(q, k, v, positions, cos, sin, *pages, *norms, *scales, out)
    return out


def _in_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if q_norm is not None and k_norm is not None:
        q, k = _rms_norm_in_torch(q, q_norm, eps), _rms_norm_in_torch(k, k_norm, eps)
    if cos is not None and sin is not None:
        cos, sin = (table[positions].to(q.dtype)[:, None] for table in (cos, sin))  # [num_tokens, 1, rotary_dim]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    ops.store_kv(k, v, k_pages, v_pages, slot_mapping, k_scales=k_scales, v_scales=v_scales)
    if out.data_ptr() != q.data_ptr() or out.stride() != q.stride():
        out.copy_(q)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary = x[..., : cos.shape[-1]]
    low, high = rotary.chunk(2, dim=-1)
    rotated = rotary * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([rotated, x[..., cos.shape[-1] :]], dim=-1)


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None) -> None:
    expected = (k.shape[0], k.shape[2])
    if q.ndim != 3 or (q.shape[0], q.shape[2]) != expected or q.dtype != k.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q must be floats [num_tokens, num_heads, head_dim] beside k {tuple(k.shape)} {k.dtype}, got {tuple(q.shape)} {q.dtype}"
        )
    if any(t.stride(2) != 1 for t in (q, k, v)):
        raise ValueError("q, k and v must be dense in the last axis")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1):
        raise ValueError(f"out must be {tuple(q.shape)} of {q.dtype}, dense in the last axis, got {tuple(out.shape)}")


def _check_tables(q: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    if positions.shape != q.shape[:1] or positions.dtype != torch.int64 or not positions.is_contiguous():
        raise ValueError(
            f"positions must be int64 [{q.shape[0]}], contiguous, got {tuple(positions.shape)} {positions.dtype}"
        )
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("cos and sin must be given together")
        return
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] > q.shape[2] or cos.shape[1] % 2:
        raise ValueError(
            f"cos and sin must be [max_positions, even rotary_dim <= head_dim], got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not cos.dtype == sin.dtype == torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"cos and sin must be contiguous float32, got {cos.dtype} and {sin.dtype}")


def _check_norms(q: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None) -> None:
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must be given together")
    for weight in (q_norm, k_norm):
        if weight is not None and (
            weight.shape != q.shape[2:] or weight.dtype != q.dtype or not weight.is_contiguous()
        ):
            raise ValueError(
                f"norm weights must be [{q.shape[2]}] of {q.dtype}, contiguous, got {tuple(weight.shape)} {weight.dtype}"
            )
