"""Launches of the kernels between the products to compile, in the shapes of Llama-3-8B, Qwen3-0.6B and wider models."""

from __future__ import annotations

import torch

from hf_accel_kernels.rope_and_store import split_qkv
from hf_accel_kernels.triton_ops.kv_store import store_kv
from hf_accel_kernels.triton_ops.rms_norm import add_rms_norm, rms_norm
from hf_accel_kernels.triton_ops.rope_and_store import rope_and_store
from hf_accel_kernels.triton_ops.swiglu import swiglu

from .chips import Case

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def _rows(size: int) -> torch.Tensor:
    return torch.empty(2, size, dtype=BF16)


def _norms(size: int) -> None:
    weight = torch.empty(size, dtype=BF16)
    rms_norm(_rows(size), weight, 1e-5)
    add_rms_norm(_rows(size), _rows(size), weight, 1e-5, 1.0)


def _pages(num_heads: int, head_dim: int, fp8: bool) -> tuple[torch.Tensor, ...]:
    pages = [torch.empty(4, num_heads, 16, head_dim, dtype=FP8 if fp8 else BF16) for _ in range(2)]
    return (*pages, *(torch.empty(4, num_heads, 16) if fp8 else None for _ in range(2)))


def _store(num_heads: int, head_dim: int, *, fp8: bool) -> None:
    pages, kv = _pages(num_heads, head_dim, fp8), torch.empty(2, num_heads, head_dim, dtype=BF16)
    store_kv(kv, kv, *pages[:2], torch.zeros(2, dtype=torch.int64), *pages[2:])


def _rope(num_heads: int, num_kv_heads: int, head_dim: int, *, norm: bool = False, fp8: bool = False) -> None:
    qkv = _rows((num_heads + 2 * num_kv_heads) * head_dim)
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads, head_dim)
    table, where = torch.empty(64, head_dim), torch.zeros(2, dtype=torch.int64)
    weight = torch.empty(head_dim, dtype=BF16) if norm else None
    pages = _pages(num_kv_heads, head_dim, fp8)
    rope_and_store(
        q, k, v, where, table, table, *pages[:2], where, weight, weight, 1e-6, *pages[2:], torch.empty_like(q)
    )


CASES = {
    "norms 4096": Case(lambda: _norms(4096)),
    "norms 16384": Case(lambda: _norms(16384)),
    "swiglu 14336": Case(lambda: swiglu(_rows(2 * 14336))),
    "store 8 x 128 fp8": Case(lambda: _store(8, 128, fp8=True)),
    "rope 32/8 x 128": Case(lambda: _rope(32, 8, 128)),
    "rope 16/8 x 128, norms, fp8": Case(lambda: _rope(16, 8, 128, norm=True, fp8=True)),
}
