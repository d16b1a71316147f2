"""CPU tensors in 2 MB memory pages: reading them end to end misses the TLB far less.

Owns the advice to the operating system, which is only a hint.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch

HUGE_PAGE = 2 << 20


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on CPU, aligned to a huge page and in huge pages where the system gives them."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    memory = torch.empty(-(-num_bytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, dtype=torch.uint8)
    skip = -memory.data_ptr() % HUGE_PAGE
    madvise = _madvise()
    if madvise is not None:
        madvise(memory.data_ptr() + skip, memory.numel() - HUGE_PAGE, mmap.MADV_HUGEPAGE)
    return memory[skip : skip + num_bytes].view(dtype).view(*shape)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise: Callable[[int, int, int], int] = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)  # type: ignore[attr-defined]
    return madvise
