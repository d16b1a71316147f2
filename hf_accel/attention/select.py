"""Which attention backend serves a model: the user's choice, or the best one that works here.

Owns the choice and its one log line. An automatic choice falls back; a named backend that cannot be had is an error.
"""

from __future__ import annotations

import logging

import torch

from .base import AttentionBackend
from .cpu_backend import CpuBackend
from .torch_backend import TorchBackend

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "torch")


def select_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> AttentionBackend:
    """The backend `name`, or for "auto" the fastest that works for `dtype` on `device`.

    Raises:
        ValueError: no such backend, or a backend asked for by name cannot work here; the message says why.
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "torch" or (name == "auto" and device.type != "cpu"):
        return TorchBackend()
    backend, reason = _cpu_backend(device, dtype)
    if backend is not None:
        return backend
    if name == "cpu":
        raise ValueError(f'the attention backend "cpu" cannot be used: {reason}; choose "auto" or "torch"')
    logger.warning("attention runs on plain torch ops, several times slower than the C++ op: %s", reason)
    return TorchBackend()


def _cpu_backend(device: torch.device, dtype: torch.dtype) -> tuple[CpuBackend | None, str]:
    if device.type != "cpu":
        return None, f"the model is on {device}, not on the CPU"
    if dtype not in CpuBackend.dtypes:
        return None, f"it computes float32, bfloat16 and float16, not {dtype}"
    try:
        return CpuBackend(), ""
    except RuntimeError as error:
        return None, str(error)
