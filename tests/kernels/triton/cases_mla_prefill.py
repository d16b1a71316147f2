"""Launches of expanded latent attention, and of the store of latents, to compile: DeepSeek's widths."""

from __future__ import annotations

import torch

from hf_accel_kernels.triton_ops.mla_prefill import expanded_attention
from hf_accel_kernels.triton_ops.mla_store import mla_store

from .chips import Case

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16


def _attend(dtype: torch.dtype) -> None:
    q, kv = torch.empty(256, 16, 192, dtype=dtype), torch.empty(256, 16 * 256, dtype=dtype)
    rope_key = torch.empty(256, 576, dtype=dtype)[:, 512:]  # as `mla_gather` gives it
    expanded_attention(q, kv, rope_key, 0.1, 128)


def _store(fp8: bool) -> None:
    latent, rope_key = torch.empty(4, 512, dtype=BF16), torch.empty(4, 64, dtype=BF16)
    pages, scales = torch.empty(8, 64, 576, dtype=FP8 if fp8 else BF16), torch.empty(8, 64, 2) if fp8 else None
    mla_store(latent, rope_key, pages, torch.zeros(4, dtype=torch.int64), scales)


CASES = {
    "bf16": Case(lambda: _attend(BF16), tensor_cores=("_prefill_kernel",), pipelined=("_prefill_kernel",)),
    "fp32": Case(lambda: _attend(torch.float32), chips=(90,)),
    "store fp8": Case(lambda: _store(True), chips=(80,)),
}
