"""Launches of absorbed latent attention to compile: DeepSeek's widths, all heads of V3 and the 16 of V2-Lite."""

from __future__ import annotations

import torch

from hf_accel_kernels.triton_ops.mla_decode import mla_attention

from .chips import Case

FP8 = torch.float8_e4m3fn


def _attend(num_heads: int, page_size: int, dtype: torch.dtype, *, fp8: bool = False, query_len: int = 1) -> None:
    num_seqs, width = 4, 576
    q = torch.empty(num_seqs * query_len, num_heads, width, dtype=dtype)
    pages = torch.empty(8, page_size, width, dtype=FP8 if fp8 else dtype)
    scales = torch.empty(8, page_size, 2) if fp8 else None
    table = torch.zeros(num_seqs, 8192 // page_size, dtype=torch.int32)
    seq_lens = torch.zeros(num_seqs, dtype=torch.int32)
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
    mla_attention(q, pages, table, seq_lens, starts, 0.1, 512, scales, torch.empty_like(q[..., :512]))


ATTEND = ("_attend_kernel",)
CASES = {
    "16 heads bf16": Case(lambda: _attend(16, 64, torch.bfloat16), tensor_cores=ATTEND, pipelined=ATTEND),
    "16 heads bf16 page 16": Case(
        lambda: _attend(16, 16, torch.bfloat16), tensor_cores=ATTEND, pipelined=ATTEND, chips=(90,)
    ),
    "16 heads bf16 chunk": Case(lambda: _attend(16, 64, torch.bfloat16, query_len=8), tensor_cores=ATTEND, chips=(80,)),
    "16 heads fp8": Case(lambda: _attend(16, 64, torch.bfloat16, fp8=True), tensor_cores=ATTEND, chips=(80, 90)),
    "128 heads bf16": Case(
        lambda: _attend(128, 64, torch.bfloat16),
        tensor_cores=ATTEND,
        spills={(3, 9): {"_attend_kernel": 80}},  # on sm_100
        chips=(90, 100),
    ),
    "128 heads fp8": Case(lambda: _attend(128, 64, torch.bfloat16, fp8=True), tensor_cores=ATTEND, chips=(90,)),
    "fp32": Case(lambda: _attend(16, 64, torch.float32), chips=(90,)),
}
