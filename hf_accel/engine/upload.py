"""Host values as device tensors, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of `values` (numbers, nested lists of them, or a CPU tensor) on `device`.

    For CUDA through pinned memory, which torch hands out again only when the copy is over.
    """
    tensor = values.to(dtype) if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host that is whole when what is queued on the device now is done; on CPU the tensor itself."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
