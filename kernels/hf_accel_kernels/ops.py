"""The attention ops' typed contract: shapes, dtypes, units, and which form computes them.

CPU tensors go to the C++ ops where the library loads (`cpu/library.py`), CUDA tensors to Triton kernels where the device runs them,
everything else to plain torch ops. Merging two attentions over parts of a context: `merge_state.py`.
Owns validation and dispatch. Knows tensors only: no request, no model, no scheduler.
"""

from __future__ import annotations

import functools

import torch

from . import torch_attention
from .cpu.attention import DTYPES, CpuAttention
from .triton_ops.launch import why_not

FP8 = torch.float8_e4m3fn
WIDEST_TRITON_DIM = 512


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into their slots of the pages. No host sync on CUDA.

    In fp8 pages a head of a token has a scale, the largest magnitude / 448 (1 where that is 0); values are divided by it.

    Args:
        k: [num_tokens, num_kv_heads, head_dim], any strides.
        v: [num_tokens, num_kv_heads, v_head_dim], any strides.
        k_pages: [num_pages, num_kv_heads, page_size, head_dim], contiguous, k's dtype or float8_e4m3fn with scales; written.
        v_pages: [num_pages, num_kv_heads, page_size, v_head_dim], contiguous, k_pages' dtype; written.
        slot_mapping: [num_tokens] int64, page * page_size + offset; a negative slot skips its token.
        k_scales: [num_pages, num_kv_heads, page_size] float32, contiguous, for fp8 pages; written.
        v_scales: the same for values.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    check_store(k, v, k_pages, v_pages, slot_mapping, k_scales, v_scales)
    if k.dtype in DTYPES and not why_not(k.device):
        from .triton_ops import kv_store

        return kv_store.store_kv(k, v, k_pages, v_pages, slot_mapping, k_scales, v_scales)
    cpu = _cpu_ops() if k.device.type == "cpu" and k.dtype in DTYPES and k_scales is None else None
    if cpu is None:
        return torch_attention.store_kv(k, v, k_pages, v_pages, slot_mapping, k_scales, v_scales)
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    return cpu.store_kv(k, v, k_pages, v_pages, slot_mapping.contiguous())


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
    num_decode_rows: int = 0,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
) -> torch.Tensor:
    """Causal attention of new tokens over their sequences' pages: prefill chunks, decode rows, or both in one call.

    Query j of a sequence with q_len queries stands at position seq_len - q_len + j and sees positions up to its own.
    Sums are fp32. Slots beyond a sequence's length are never read into a result.

    Args:
        q: [num_tokens, num_heads, head_dim], float32, bfloat16 or float16, any strides.
        k_pages: [num_pages, num_kv_heads, page_size, head_dim], contiguous, q's dtype, or float8_e4m3fn with scales.
        v_pages: [num_pages, num_kv_heads, page_size, v_head_dim], contiguous, k_pages' dtype.
        page_table: [num_seqs, max_pages] int32; entries beyond a sequence's pages are ignored.
        seq_lens: [num_seqs] int32, context lengths including this step's tokens, already stored.
        query_start_loc: [num_seqs + 1] int32, where each sequence's tokens begin in q.
        scale: factor on the dot products.
        sliding_window: 0 for none; w: the token at position i sees positions (i - w, i].
        softcap: 0 for none; else logits become softcap * tanh(logits / softcap).
        sinks: [num_heads] or None; one more logit per head in the softmax's denominator (GPT-OSS).
        k_scales: [num_pages, num_kv_heads, page_size] float32, contiguous: a stored key times its scale is the key; for fp8.
        v_scales: the same for values.
        out: [num_tokens, num_heads, v_head_dim] to write to, or None for a new one; tokens that see nothing get zeros.
        out_lse: [num_tokens, num_heads] float32 to write to, or None: natural logs of the sums of exponentials, the sink's
            among them; tokens that see nothing get their sink, or -inf.
        num_decode_rows: that many leading sequences are known to have one query token each: they split long contexts.
        max_query_len: no sequence has more query tokens; None: not known. Bounds CUDA grids, as does the next one.
        max_seq_len: no sequence is longer; None: bounded by page_table's width.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_pages(k_pages, v_pages)
    _check_queries(q, k_pages, page_table, seq_lens, query_start_loc)
    _check_scales(k_pages, k_scales, v_scales)
    if out is None:
        out = torch.empty(q.shape[0], q.shape[1], v_pages.shape[3], dtype=q.dtype, device=q.device)
    elif out.shape != (q.shape[0], q.shape[1], v_pages.shape[3]) or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out must be [num_tokens, num_heads, v_head_dim] of q's dtype, got {tuple(out.shape)}")
    if out_lse is not None and (
        out_lse.shape != q.shape[:2] or out_lse.dtype != torch.float32 or out_lse.stride(1) != 1
    ):
        raise ValueError(f"out_lse must be float32 [num_tokens, num_heads], got {tuple(out_lse.shape)} {out_lse.dtype}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [num_heads] = [{q.shape[1]}], got {tuple(sinks.shape)}")
    rows = (page_table, seq_lens, query_start_loc)
    options = {"sliding_window": sliding_window, "softcap": softcap, "k_scales": k_scales, "v_scales": v_scales}
    outs = {"out": out, "out_lse": out_lse}
    if _has_triton_form(q, v_pages):
        from .triton_ops import paged_attention as kernels

        hints = {"num_decode_rows": num_decode_rows, "max_query_len": max_query_len, "max_seq_len": max_seq_len}
        kernels.paged_attention(q, k_pages, v_pages, *rows, scale, sinks=sinks, **options, **hints, **outs)
        return out
    cpu = _cpu_ops() if q.device.type == "cpu" and q.dtype in DTYPES and k_scales is None and out_lse is None else None
    if cpu is None:
        lens = (query_start_loc.diff().tolist(), seq_lens.tolist())
        pages = (k_pages, v_pages, page_table, seq_lens)
        return torch_attention.paged_attention(q, *pages, *lens, scale, sinks=sinks, **options, **outs)
    q = q if q.stride(2) == 1 else q.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    seq_lens, starts = seq_lens.contiguous(), query_start_loc.contiguous()
    cpu.paged_attention(q, k_pages, v_pages, page_table, seq_lens, starts, scale, sliding_window, softcap, sinks, out)
    return out


def _has_triton_form(q: torch.Tensor, v_pages: torch.Tensor) -> bool:
    return max(q.shape[2], v_pages.shape[3]) <= WIDEST_TRITON_DIM and q.dtype in DTYPES and not why_not(q.device)


@functools.cache
def _cpu_ops() -> CpuAttention | None:
    try:
        return CpuAttention()
    except RuntimeError:
        return None


def _check_pages(k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    if k_pages.ndim != 4 or v_pages.ndim != 4 or k_pages.shape[:3] != v_pages.shape[:3]:
        raise ValueError(
            "k_pages and v_pages must be [num_pages, num_kv_heads, page_size, dim] with the same first three sizes, "
            f"got {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
        )
    if k_pages.dtype != v_pages.dtype or not k_pages.is_contiguous() or not v_pages.is_contiguous():
        raise ValueError("k_pages and v_pages must be contiguous and of one dtype")


def check_store(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> None:
    """Raise ValueError for arguments that `store_kv` does not take."""
    _check_pages(k_pages, v_pages)
    _check_scales(k_pages, k_scales, v_scales)
    expected = (slot_mapping.shape[0], k_pages.shape[1])
    if (*expected, k_pages.shape[3]) != k.shape or (*expected, v_pages.shape[3]) != v.shape:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [num_tokens, num_kv_heads, dim] for "
            f"{expected[0]} slots and pages {tuple(k_pages.shape)}, {tuple(v_pages.shape)}"
        )
    fits = k.is_floating_point() if k_pages.dtype == FP8 else k.dtype == k_pages.dtype
    if not fits or k.dtype != v.dtype or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"k, v and the pages must share one dtype ({k.dtype}, {v.dtype}, {k_pages.dtype}), or the pages be fp8; slots int64"
        )


def _check_scales(pages: torch.Tensor, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None) -> None:
    if (pages.dtype == FP8) != (k_scales is not None) or (k_scales is None) != (v_scales is None):
        raise ValueError(f"pages of float8_e4m3fn, and only they, have k_scales and v_scales; got {pages.dtype}")
    for scales in (k_scales, v_scales):
        if scales is not None and (
            scales.shape != pages.shape[:3] or scales.dtype != torch.float32 or not scales.is_contiguous()
        ):
            raise ValueError(
                f"scales must be [num_pages, num_kv_heads, page_size] float32, contiguous, got {tuple(scales.shape)} "
                f"{scales.dtype} for pages {tuple(pages.shape)}"
            )


def _check_queries(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> None:
    fits = q.dtype in DTYPES if k_pages.dtype == FP8 else q.dtype == k_pages.dtype
    if q.ndim != 3 or q.shape[2] != k_pages.shape[3] or q.shape[1] % k_pages.shape[1] or not fits:
        raise ValueError(
            f"q must be [num_tokens, num_heads, head_dim] of the pages' dtype (or they fp8), num_heads a multiple of num_kv_heads; "
            f"got {tuple(q.shape)} {q.dtype} for pages {tuple(k_pages.shape)} {k_pages.dtype}"
        )
    num_seqs = seq_lens.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != num_seqs or query_start_loc.shape != (num_seqs + 1,):
        raise ValueError(
            f"page_table {tuple(page_table.shape)}, seq_lens {tuple(seq_lens.shape)} and query_start_loc "
            f"{tuple(query_start_loc.shape)} must be [num_seqs, max_pages], [num_seqs], [num_seqs + 1]"
        )
    if not page_table.dtype == seq_lens.dtype == query_start_loc.dtype == torch.int32:
        raise ValueError("page_table, seq_lens and query_start_loc must be int32")
