"""A fingerprint of a strided sample of many tensors, in one pass per device: has anybody rewritten them?

Owns which elements are read and how they are mixed. Knows nothing about models, nor what a change means.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from hf_accel_kernels.cpu import library

NUM_SAMPLES = 16
"""Samples of one tensor: first and last always among them, the others evenly spread. Each is a cache miss on CPU."""

_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class SampledFingerprint:
    """Fingerprints a fixed list of tensors again and again.

    On CPU a C++ function reads 8-byte words straight from memory (a torch form where it could not be built); on other
    devices the sampled elements are gathered by one `torch.cat` per dtype, hashed there, and read back with one copy.
    A change of one sampled word always changes the result, since every mixing step is a bijection (CPU) or the weights of
    the sum are odd (torch); several changes cancel out with probability about 2**-64.

    Args:
        tensors: any shapes, strides, dtypes and devices; tensors without memory of their own (meta) must be left out.
        num_samples: most samples of one tensor, even, at least 2.

    The plan holds no reference to the tensors. It is good for as long as their addresses, shapes, strides and dtypes
    stay what they were.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], num_samples: int = NUM_SAMPLES) -> None:
        self._num_samples = num_samples
        function = _native()
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        host: list[torch.Tensor] = []
        for i, tensor in enumerate(tensors):
            if tensor.numel() == 0:
                continue
            if function is not None and tensor.device.type == "cpu" and _is_dense(tensor):
                host.append(tensor)
            else:
                groups.setdefault((tensor.device, tensor.dtype), []).append(i)
        self._function = function
        self._ptrs = (ctypes.c_void_p * len(host))(*[t.data_ptr() for t in host])
        self._num_bytes = (ctypes.c_int64 * len(host))(*[t.numel() * t.element_size() for t in host])
        self._gathers = [_Gather([(i, tensors[i]) for i in members], num_samples) for members in groups.values()]

    def compute(self, tensors: Sequence[torch.Tensor]) -> int:
        """The fingerprint of the tensors' bits now; `tensors` are those the plan was made for, in the same order."""
        state = 0
        if len(self._ptrs):
            assert self._function is not None
            state = self._function(self._ptrs, self._num_bytes, len(self._ptrs), self._num_samples, 0)
        if self._gathers:
            with torch.no_grad():
                sums = [gather.hash(tensors) for gather in self._gathers]
                for value in _to_host(sums):
                    state = (state * 0x9E3779B97F4A7C15 + value) % (1 << 64)
        return state


class _Gather:
    """The samples of all tensors of one device and dtype, and one multiplier for each."""

    def __init__(self, members: list[tuple[int, torch.Tensor]], num_samples: int) -> None:
        self._views = [(i, *_sample_view(tensor, num_samples)) for i, tensor in members]
        self._int_dtype = _INT_OF_SIZE[members[0][1].element_size()]
        self._weights: torch.Tensor | None = None  # [num_words] int64, odd

    def hash(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum of sampled words times their multipliers, modulo 2**64: a 0-dim int64 on the group's device."""
        samples = [
            tensors[i][index] if index is not None else tensors[i].as_strided(size, stride).reshape(-1)
            for i, size, stride, index in self._views
        ]
        words = torch.cat(samples).view(self._int_dtype).to(torch.int64)  # [num_words]
        if self._weights is None:
            generator = torch.Generator().manual_seed(0x5EED)
            weights = torch.randint(-(1 << 62), 1 << 62, words.shape, generator=generator, dtype=torch.int64)
            self._weights = (2 * weights + 1).to(words.device)
        return (words * self._weights).sum()


def _sample_view(
    tensor: torch.Tensor, num_samples: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[torch.Tensor, ...] | None]:
    """(size, stride, None) of an `as_strided` view of a dense tensor's samples, or an index that picks them."""
    numel = tensor.numel()
    if not _is_dense(tensor):
        flat = torch.linspace(0, numel - 1, min(numel, num_samples), dtype=torch.float64).long()
        return (), (), tuple(index.to(tensor.device) for index in torch.unravel_index(flat, tensor.shape))
    if numel <= num_samples:
        return (numel,), (1,), None
    # Two interleaved rows of half the samples: one starts at the first element, the other ends at the last.
    half = num_samples // 2
    step = (numel - 1 - numel // num_samples) // max(half - 1, 1)
    return (2, half), (numel - 1 - (half - 1) * step, step), None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one unbroken range of memory."""
    if tensor.is_contiguous():
        return True
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return span == tensor.numel() and 0 not in tensor.stride()


def _to_host(values: list[torch.Tensor]) -> list[int]:
    """0-dim tensors as ints, with one copy for each device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for value in values:
        by_device.setdefault(value.device, []).append(value)
    return [number for group in by_device.values() for number in torch.stack(group).tolist()]


@functools.cache
def _native() -> Callable[..., int] | None:
    """`hfa_fingerprint`, or None where the C++ ops could not be built.

    Called with the interpreter's lock held: no other thread can free the memory while it is read.
    """
    lib, _ = library.load()
    if lib is None:
        return None
    pointers, sizes = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64)
    prototype = ctypes.PYFUNCTYPE(ctypes.c_uint64, pointers, sizes, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64)
    return prototype(("hfa_fingerprint", lib))
