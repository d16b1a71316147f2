"""Launches of the paged attention kernels to compile: heads of real models."""

from __future__ import annotations

import torch

from hf_accel_kernels.triton_ops.paged_attention import paged_attention

from .chips import Case

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def _attend(
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    page_size: int = 16,
    *,
    decode: bool = False,
    kv: torch.dtype = BF16,
    dtype: torch.dtype = BF16,
    window: int = 0,
    softcap: float = 0.0,
    query_len: int = 2048,
) -> None:
    tokens, num_seqs = (2, 2) if decode else (query_len, 1)
    q = torch.empty(tokens, num_heads, dim, dtype=dtype)
    pages = torch.empty(1, num_kv_heads, page_size, dim, dtype=kv)
    scales = torch.empty(1, num_kv_heads, page_size) if kv == FP8 else None
    paged_attention(
        q,
        pages,
        pages,
        torch.empty(num_seqs, 8192 // page_size, dtype=torch.int32),
        torch.empty(num_seqs, dtype=torch.int32),
        torch.empty(num_seqs + 1, dtype=torch.int32),
        0.1,
        k_scales=scales,
        v_scales=scales,
        sliding_window=window,
        softcap=softcap,
        sinks=None,
        num_decode_rows=num_seqs if decode else 0,
        max_query_len=1 if decode else query_len,
        max_seq_len=None,
        out=torch.empty(tokens, num_heads, dim, dtype=dtype),
        out_lse=None,
    )


DECODE = {"tensor_cores": ("_decode_kernel",), "pipelined": ("_decode_kernel",)}
PREFILL = {"tensor_cores": ("_prefill_kernel",), "pipelined": ("_prefill_kernel",)}
CASES = {
    "decode 32/8 d128": Case(lambda: _attend(32, 8, 128, decode=True), **DECODE),
    "decode 32/8 d64 page 128": Case(lambda: _attend(32, 8, 64, 128, decode=True), chips=(90,), **DECODE),
    "decode 16/8 d256 window": Case(lambda: _attend(16, 8, 256, decode=True, window=1024, softcap=50.0), **DECODE),
    "decode 32/8 fp8 d128": Case(lambda: _attend(32, 8, 128, decode=True, kv=FP8), chips=(80, 90), **DECODE),
    "prefill 32/8 d128": Case(lambda: _attend(32, 8, 128), **PREFILL),
    "prefill 64/8 d64 window": Case(lambda: _attend(64, 8, 64, window=128), chips=(80, 90), **PREFILL),
    "prefill 16/8 d256 page 64": Case(lambda: _attend(16, 8, 256, 64, softcap=50.0), chips=(90, 100), **PREFILL),
    "prefill 32/8 fp8 d128": Case(lambda: _attend(32, 8, 128, kv=FP8), chips=(80, 90), **PREFILL),
}
