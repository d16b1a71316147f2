"""Multi-head latent attention (DeepSeek-V2 and V3, arXiv 2405.04434) over pages of latents: the typed contract of its ops.

A token's row is its latent (`rank` values, after kv_a_layernorm) and the rotated key that all heads share (`rope` values).
Absorbed, a head's query is taken into latent space and every row is read once for all heads; expanded (`mla_expanded.py`),
latents become every head's keys and values. CPU tensors go to the C++ ops where the library loads, CUDA tensors to Triton
kernels, which wait for nothing on the host, everything else to torch ops. Owns validation and dispatch. Knows tensors only.
"""

from __future__ import annotations

import functools

import torch

from . import mla_torch
from .cpu.attention import DTYPES
from .cpu.mla import CpuMla
from .mla_expanded import mla_expanded_attention, prefer_expanded
from .mla_torch import FP8
from .mla_weights import AbsorbedWeights
from .triton_ops.launch import why_not

__all__ = [
    "AbsorbedWeights",
    "mla_absorbed_attention",
    "mla_attention",
    "mla_expanded_attention",
    "mla_gather",
    "mla_store",
    "prefer_expanded",
]


def mla_store(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Write the rows of new tokens into their slots of the pages.

    Args:
        latent: [num_tokens, rank], float32, bfloat16 or float16, any strides.
        rope_key: [num_tokens, rope], latent's dtype, any strides.
        pages: [num_pages, page_size, rank + rope], contiguous, latent's dtype or (with `scales`) float8_e4m3fn; written.
        slot_mapping: [num_tokens] int64, page * page_size + offset; a negative slot skips its token (not in torch ops on CUDA).
        scales: [num_pages, page_size, 2] float32, contiguous; written with what the stored latent and the stored
            rotary key are to be multiplied with: the largest magnitude / 448, or 1 where that is 0.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_pages(pages, scales, latent.dtype)
    num_tokens = slot_mapping.shape[0]
    if (
        latent.ndim != 2
        or rope_key.ndim != 2
        or not latent.shape[0] == rope_key.shape[0] == num_tokens
        or latent.shape[1] + rope_key.shape[1] != pages.shape[2]
    ):
        raise ValueError(
            f"latent {tuple(latent.shape)} and rope_key {tuple(rope_key.shape)} must be [num_tokens, rank] and "
            f"[num_tokens, rope] for {num_tokens} slots and pages {tuple(pages.shape)} of rank + rope"
        )
    if latent.dtype != rope_key.dtype or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"latent and rope_key must share one dtype ({latent.dtype}, {rope_key.dtype}) and slots must be int64"
        )
    if not why_not(latent.device):
        from .triton_ops import mla_store as kernel

        return kernel.mla_store(latent, rope_key, pages, slot_mapping, scales)
    cpu = _cpu_ops() if latent.device.type == "cpu" else None
    if cpu is None:
        return mla_torch.mla_store(latent, rope_key, pages, slot_mapping, scales)
    latent = latent if latent.stride(1) == 1 else latent.contiguous()
    rope_key = rope_key if rope_key.stride(1) == 1 else rope_key.contiguous()
    return cpu.store(latent, rope_key, pages, slot_mapping.contiguous(), scales)


def mla_gather(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    length: int,
    scales: torch.Tensor | None = None,
    *,
    rank: int,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `length` rows of a sequence as dense tensors.

    Args:
        pages: [num_pages, page_size, rank + rope], contiguous.
        page_ids: [>= ceil(length / page_size)] int, the sequence's pages in order; further entries are ignored.
        length: rows wanted.
        scales: [num_pages, page_size, 2] float32, for float8_e4m3fn pages only.
        rank: of the latents.
        dtype: of the result; the pages' own by default, to be named for float8_e4m3fn pages.

    Returns:
        (latent [length, rank], rope_key [length, rope]), views of one tensor.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    dtype = dtype or (pages.dtype if scales is None else None)
    if dtype is None:
        raise ValueError("mla_gather needs the dtype of its result for float8_e4m3fn pages")
    _check_pages(pages, scales, dtype, any_float=True)
    num_pages = -(-length // pages.shape[1])
    if page_ids.ndim != 1 or page_ids.shape[0] < num_pages or not 0 < rank <= pages.shape[2]:
        raise ValueError(
            f"page_ids {tuple(page_ids.shape)} must name {num_pages} pages for {length} rows, and rank {rank} fit in "
            f"pages {tuple(pages.shape)}"
        )
    rows = mla_torch.gather_rows(pages, page_ids[:num_pages], rank, scales, dtype).flatten(0, 1)[:length]
    return rows[:, :rank], rows[:, rank:]


def mla_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    rank: int,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of absorbed queries over rows of latents: prefill chunks, decode rows, or both in one call.

    Query j of a sequence with q_len queries stands at position seq_len - q_len + j and sees positions up to its own.
    Sums are fp32. Slots beyond a sequence's length never reach a result.

    Args:
        q: [num_tokens, num_heads, rank + rope], float32, bfloat16 or float16, any strides; in latent space.
        pages: [num_pages, page_size, rank + rope], contiguous, q's dtype or (with `scales`) float8_e4m3fn.
        page_table: [num_seqs, max_pages] int32; entries beyond a sequence's pages are ignored.
        seq_lens: [num_seqs] int32, context lengths including this step's tokens, already stored.
        query_start_loc: [num_seqs + 1] int32, where each sequence's tokens begin in q.
        scale: factor on the dot products.
        rank: of the latents.
        scales: [num_pages, page_size, 2] float32, as `mla_store` wrote them.
        out: [num_tokens, num_heads, rank] of q's dtype to write to, or None for a new one; tokens that see nothing get
            zeros.

    Returns:
        `out`: the weighted means of the latents.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_pages(pages, scales, q.dtype)
    if q.ndim != 3 or q.shape[2] != pages.shape[2] or not 0 < rank <= pages.shape[2]:
        raise ValueError(
            f"q must be [num_tokens, num_heads, rank + rope] for pages {tuple(pages.shape)} and rank {rank}, "
            f"got {tuple(q.shape)}"
        )
    _check_tables(page_table, seq_lens, query_start_loc)
    out = _check_out(out, q, rank)
    if not why_not(q.device):
        from .triton_ops import mla_decode

        mla_decode.mla_attention(q, pages, page_table, seq_lens, query_start_loc, scale, rank, scales, out)
        return out
    cpu = _cpu_ops() if q.device.type == "cpu" else None
    if cpu is None:
        mla_torch.mla_attention(q, pages, page_table, seq_lens, query_start_loc, scale, rank, scales, out)
        return out
    tables = _plain_tables(page_table, seq_lens, query_start_loc)
    cpu.attention(q if q.stride(2) == 1 else q.contiguous(), pages, *tables, scale, rank, scales, out)
    return out


def mla_absorbed_attention(
    q: torch.Tensor,
    weights: AbsorbedWeights,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mla_attention` from a model's own queries to its heads' outputs: absorb, attend, expand.

    Intermediates (the absorbed query and the mean latent) are of q's dtype, sums fp32.

    Args:
        q: [num_tokens, num_heads, nope + rope], the weights' dtype, any strides; the last `rope` values rotated.
        weights: kv_b_proj's weight, taken apart.
        pages, page_table, seq_lens, query_start_loc, scale, scales: as for `mla_attention`.
        out: [num_tokens, num_heads, v] to write to, or None for a new one.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_pages(pages, scales, q.dtype)
    rope = pages.shape[2] - weights.rank
    if (
        q.ndim != 3
        or q.shape[1:] != (weights.num_heads, weights.nope + rope)
        or (q.dtype, q.device) != (weights.dtype, weights.device)
    ):
        raise ValueError(
            f"q must be [num_tokens, {weights.num_heads}, {weights.nope} + rope] of {weights.dtype} on {weights.device} for pages "
            f"{tuple(pages.shape)} and rank {weights.rank}, got {tuple(q.shape)} {q.dtype} on {q.device}"
        )
    _check_tables(page_table, seq_lens, query_start_loc)
    out = _check_out(out, q, weights.v)
    cpu = _cpu_ops() if q.device.type == "cpu" else None
    if cpu is None:
        w_uk, w_uv = weights.views()
        tables = (page_table, seq_lens, query_start_loc)
        o_lat = mla_attention(mla_torch.absorb(q, w_uk), pages, *tables, scale, rank=weights.rank, scales=scales)
        return mla_torch.expand(o_lat, w_uv, out)
    tables = _plain_tables(page_table, seq_lens, query_start_loc)
    cpu.absorbed(q if q.stride(2) == 1 else q.contiguous(), weights, pages, *tables, scale, scales, out)
    return out


@functools.cache
def _cpu_ops() -> CpuMla | None:
    try:
        return CpuMla()
    except RuntimeError:
        return None


def _check_pages(
    pages: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype, *, any_float: bool = False
) -> None:
    if pages.ndim != 3 or not pages.is_contiguous():
        raise ValueError(f"pages must be [num_pages, page_size, rank + rope], contiguous, got {tuple(pages.shape)}")
    if dtype not in DTYPES and not (any_float and dtype.is_floating_point):
        raise ValueError(f"latent attention takes float32, bfloat16 or float16, not {dtype}")
    if (pages.dtype == FP8) != (scales is not None) or (scales is None and pages.dtype != dtype):
        raise ValueError(
            f"pages must be of {dtype}, or float8_e4m3fn with scales; got {pages.dtype} with"
            f"{'out' if scales is None else ''} scales"
        )
    if scales is None:
        return
    if scales.shape != (*pages.shape[:2], 2) or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(
            f"scales must be [num_pages, page_size, 2] float32, contiguous, got {tuple(scales.shape)} {scales.dtype} "
            f"for pages {tuple(pages.shape)}"
        )


def _check_tables(page_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
    num_seqs = seq_lens.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != num_seqs or query_start_loc.shape != (num_seqs + 1,):
        raise ValueError(
            f"page_table {tuple(page_table.shape)}, seq_lens {tuple(seq_lens.shape)} and query_start_loc "
            f"{tuple(query_start_loc.shape)} must be [num_seqs, max_pages], [num_seqs], [num_seqs + 1]"
        )
    if not page_table.dtype == seq_lens.dtype == query_start_loc.dtype == torch.int32:
        raise ValueError("page_table, seq_lens and query_start_loc must be int32")


def _check_out(out: torch.Tensor | None, q: torch.Tensor, width: int) -> torch.Tensor:
    shape = (q.shape[0], q.shape[1], width)
    if out is None:
        return torch.empty(shape, dtype=q.dtype, device=q.device)
    if out.shape != shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(
            f"out must be {shape} of {q.dtype}, last dimension contiguous, got {tuple(out.shape)} {out.dtype}"
        )
    return out


def _plain_tables(
    page_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    return page_table, seq_lens.contiguous(), query_start_loc.contiguous()
