"""Which attention backend serves a model: the user's choice, or the best one that works here.

Owns the choice and its one log line. An automatic choice falls back; a named backend that cannot be had is an error.
"""

from __future__ import annotations

import logging

import torch

from hf_accel_kernels.triton_ops.launch import why_not

from .base import AttentionBackend
from .cpu_backend import CpuBackend
from .flashinfer_backend import FlashInferBackend, why_not_flashinfer
from .torch_backend import TorchBackend
from .triton_backend import TritonBackend

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "torch", "triton", "flashinfer")


def select_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> AttentionBackend:
    """The backend `name`, or for "auto" the fastest that works for `dtype` on `device`.

    Raises:
        ValueError: no such backend, or a backend asked for by name cannot work here; the message says why.
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "torch":
        return TorchBackend()
    backend: AttentionBackend | None
    if name == "flashinfer" or (name == "auto" and device.type != "cpu"):
        backend, reason = _flashinfer_backend(device, dtype, strict=name == "flashinfer")
        if backend is not None:
            return backend
        if name == "flashinfer":
            raise ValueError(f'the attention backend "flashinfer" cannot be used: {reason}; choose "auto" or "triton"')
        logger.info("attention does without flashinfer: %s", reason)
    if name == "triton" or (name == "auto" and device.type != "cpu"):
        backend, reason = _triton_backend(device, dtype)
        slow = f"on {device}, several times slower than the Triton kernels"
    else:
        backend, reason = _cpu_backend(device, dtype)
        slow = "several times slower than the C++ op"
    if backend is not None:
        return backend
    if name != "auto":
        raise ValueError(f'the attention backend "{name}" cannot be used: {reason}; choose "auto" or "torch"')
    logger.warning("attention runs on plain torch ops, %s: %s", slow, reason)
    return TorchBackend()


def _triton_backend(device: torch.device, dtype: torch.dtype) -> tuple[TritonBackend | None, str]:
    if dtype not in TritonBackend.dtypes:
        return None, f"it computes float32, bfloat16 and float16, not {dtype}"
    reason = why_not(device)
    return (None, reason) if reason else (TritonBackend(device), "")


def _flashinfer_backend(
    device: torch.device, dtype: torch.dtype, *, strict: bool
) -> tuple[FlashInferBackend | None, str]:
    if dtype not in FlashInferBackend.dtypes:
        return None, f"it computes bfloat16 and float16, not {dtype}"
    other, reason = _triton_backend(device, dtype)
    reason = reason or why_not_flashinfer()
    if other is None or reason:
        return None, reason
    return FlashInferBackend(other, strict=strict), ""


def _cpu_backend(device: torch.device, dtype: torch.dtype) -> tuple[CpuBackend | None, str]:
    if device.type != "cpu":
        return None, f"the model is on {device}, not on the CPU"
    if dtype not in CpuBackend.dtypes:
        return None, f"it computes float32, bfloat16 and float16, not {dtype}"
    try:
        return CpuBackend(), ""
    except RuntimeError as error:
        return None, str(error)
