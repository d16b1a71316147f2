"""One draw per row of a probability matrix: torch.multinomial's own ids and its own use of the generator, sooner.

torch draws an exponential for every element and takes the largest p / q. Here only elements of positive probability get
theirs; the generator still advances past all of them. Whatever is not reproduced bit for bit goes to torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable

import torch

from hf_accel_kernels.cpu import library

logger = logging.getLogger("hf_accel")

MAX_CATEGORIES = 1 << 24  # torch refuses more
STATE_BYTES = 5056  # of a CPU generator: the Mersenne twister's state and the cached normals

_generator_lock = threading.Lock()


def multinomial(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """`torch.multinomial(probs, num_samples=1, generator=generator)`: same ids, same state of the generator afterwards.

    Args:
        probs: [num_rows, vocab_size], not negative, no row all zero; need not sum to 1. Dense float32 on CPU is fast.
        generator: a CPU generator; torch's default one when None.

    Returns:
        [num_rows, 1] int64.

    Raises:
        RuntimeError: torch's own, for rows that are negative, infinite, NaN or all zero.

    Another thread that uses the same generator during a call (other than through this function) may see the same numbers.
    """
    if type(probs) is torch.Tensor and probs.device.type == "cpu" and probs.dtype == torch.float32:
        function = _checked_native()
        source = torch.default_generator if generator is None else generator
        if function is not None and source.device.type == "cpu":
            ids = _draw(function, probs, source)
            if ids is not None:
                return ids
    return torch.multinomial(probs, num_samples=1, generator=generator)


def _draw(function: Callable[..., int], probs: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """[num_rows, 1] ids and the generator advanced, or None with nothing changed: torch must do it."""
    if probs.dim() != 2 or not probs.is_contiguous() or probs.shape[1] > MAX_CATEGORIES:
        return None
    num_rows, vocab_size = probs.shape
    ids = torch.empty((num_rows, 1), dtype=torch.int64, device="cpu")
    with _generator_lock:
        state = generator.get_state()
        if state.numel() != STATE_BYTES:
            return None
        if not function(probs.data_ptr(), num_rows, vocab_size, state.data_ptr(), ids.data_ptr()):
            return None
        generator.set_state(state)
    return ids


@functools.cache
def _checked_native() -> Callable[..., int] | None:
    """`hfa_multinomial`, or None where it is not built or does not reproduce this torch's draws."""
    function = _native()
    if function is None or _agrees_with_torch(function):
        return function
    logger.warning("torch.multinomial draws differently here than the C++ op: sampling uses torch's own")
    return None


@functools.cache
def _native() -> Callable[..., int] | None:
    """`hfa_multinomial`, called with the interpreter's lock held: no other thread moves the generator meanwhile."""
    lib, _ = library.load()
    if lib is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int32, pointer, size, size, pointer, pointer)
    return prototype(("hfa_multinomial", lib))


def _agrees_with_torch(function: Callable[..., int]) -> bool:
    """Whether ids and generator states equal torch's on a few tensors. Uses generators of its own only."""
    ours, theirs, source = (torch.Generator(device="cpu") for _ in range(3))
    for seed, (num_rows, vocab_size, kept) in enumerate([(1, 7, 7), (3, 101, 5), (4, 1000, 40), (2, 5003, 5003)]):
        scores = torch.randn((num_rows, vocab_size), generator=source.manual_seed(seed), device="cpu")
        threshold = scores.topk(kept, dim=-1).values[:, -1:]
        probs = torch.where(scores < threshold, float("-inf"), scores).to(torch.float32).softmax(dim=-1)
        for generator in (ours, theirs):
            generator.manual_seed(1000 + seed)
        for _ in range(3):
            ids = _draw(function, probs, ours)
            expected = torch.multinomial(probs, num_samples=1, generator=theirs)
            if ids is None or not torch.equal(ids, expected):
                return False
            if not torch.equal(ours.get_state(), theirs.get_state()):
                return False
    return True
