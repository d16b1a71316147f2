"""Launches of the sampling kernels to compile."""

from __future__ import annotations

import torch

from hf_accel_kernels.triton_ops import argmax, sampling

from .chips import Case

LLAMA, GEMMA = 128256, 262144  # tokens of their vocabularies


def _sample(dtype: torch.dtype, vocab_size: int, masked: bool) -> None:
    settings = [
        torch.zeros(2, dtype=d) for d in (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)
    ]
    masks = _masks(vocab_size) if masked else (None, None)
    sampling.sample(torch.empty(2, vocab_size, dtype=dtype), *settings, *masks)


def _masks(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(2, vocab_size // 32, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)


def _argmax() -> None:
    argmax.argmax(torch.empty(2, LLAMA), *_masks(LLAMA))


def _logprobs() -> None:
    argmax.logprobs(torch.empty(2, LLAMA), torch.zeros(2, dtype=torch.int64))


CASES = {
    "128k fp32": Case(lambda: _sample(torch.float32, LLAMA, masked=False), chips=(90,)),
    "256k bf16 with masks": Case(lambda: _sample(torch.bfloat16, GEMMA, masked=True)),
    "argmax with masks": Case(_argmax),
    "logprobs": Case(_logprobs),
}
