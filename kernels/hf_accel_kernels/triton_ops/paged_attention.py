"""Paged attention on CUDA: leading rows of one token to the decode kernel, the rest to the prefill kernel."""

from __future__ import annotations

import torch

from .paged_decode import paged_decode
from .paged_prefill import paged_prefill

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
WIDEST = 512  # head_dim and v_head_dim


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    sliding_window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    num_decode_rows: int,
    max_query_len: int | None,
    max_seq_len: int | None,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
) -> None:
    """`ops.paged_attention`; validates nothing."""
    q = q if q.stride(2) == 1 else q.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    seq_lens, query_start_loc = seq_lens.contiguous(), query_start_loc.contiguous()
    num_seqs, n = seq_lens.shape[0], num_decode_rows
    capacity = page_table.shape[1] * k_pages.shape[2]
    cache = (k_pages, v_pages, k_scales, v_scales)
    if n:
        paged_decode(
            q[:n],
            *cache,
            page_table[:n],
            seq_lens[:n],
            scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            max_seq_len=capacity if max_seq_len is None else max_seq_len,
            out=out[:n],
            out_lse=None if out_lse is None else out_lse[:n],
        )
    if n < num_seqs:
        num_tokens = q.shape[0] - n
        paged_prefill(
            q,
            *cache,
            page_table,
            seq_lens,
            query_start_loc,
            scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            first_seq=n,
            num_tokens=num_tokens,
            max_query_len=num_tokens if max_query_len is None else min(max_query_len, num_tokens),
            out=out,
            out_lse=out_lse,
        )
