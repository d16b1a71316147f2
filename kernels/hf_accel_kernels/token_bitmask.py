"""Packed token masks applied to a batch of logits: the typed contract, its checks and which form computes it.

Structured output keeps one table of distinct masks; a row of logits names the mask it must obey. Knows tensors only.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from .cpu import library
from .triton_ops.launch import why_not

WORD_BITS = 32


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, mask_rows: torch.Tensor | None = None) -> None:
    """Set the logits of tokens that their row's mask forbids to -inf, in place. No host sync.

    Args:
        logits: [num_rows, vocab_size], float32, bfloat16 or float16, last axis dense; written.
        bitmask: [num_masks, num_words] int32, contiguous: bit i % 32 of word i // 32 allows token i. Tokens past the last
            word are forbidden.
        mask_rows: [num_rows] int32, contiguous, the mask of each row of logits, negative for none; None: row i obeys mask i.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    check_token_bitmask(logits, bitmask, mask_rows)
    if not why_not(logits.device):
        from .triton_ops import token_bitmask

        token_bitmask.apply_token_bitmask(logits, bitmask, mask_rows)
    elif not _copy_on_cpu(logits, logits, bitmask, mask_rows):
        _apply_in_torch(logits, bitmask, mask_rows)


def masked(logits: torch.Tensor, bitmask: torch.Tensor, mask_rows: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of `logits` with `apply_token_bitmask` applied to it: on CPU in one pass. Arguments and errors are its own."""
    check_token_bitmask(logits, bitmask, mask_rows)
    copy = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not _copy_on_cpu(logits, copy, bitmask, mask_rows):
        apply_token_bitmask(copy.copy_(logits), bitmask, mask_rows)
    return copy


_INFINITY_BITS = {torch.float32: 0xFF800000, torch.bfloat16: 0xFF80, torch.float16: 0xFC00}  # of -inf


@functools.cache
def _native() -> Callable[..., None] | None:
    lib, _ = library.load()
    if lib is None:
        return None
    pointer, size, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    function = lib.hfa_token_bitmask
    function.argtypes = (pointer, pointer, size, size, size, size, pointer, size, pointer, word, ctypes.c_uint32, word)
    function.restype = None
    return function


def _copy_on_cpu(source: torch.Tensor, target: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor | None) -> bool:
    """Whether the C++ op wrote the masked rows of `source` to `target`, which may be the same."""
    function = _native() if source.device.type == "cpu" and source.dtype in _INFINITY_BITS else None
    if function is None or bitmask.device.type != "cpu":
        return False
    function(
        *(source.data_ptr(), target.data_ptr(), source.stride(0), target.stride(0), *source.shape),
        *(bitmask.data_ptr(), bitmask.shape[1], None if rows is None else rows.data_ptr()),
        *(source.element_size(), _INFINITY_BITS[source.dtype], torch.get_num_threads()),
    )
    return True


def check_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, mask_rows: torch.Tensor | None) -> None:
    """Raise what `apply_token_bitmask` raises for its arguments."""
    if logits.ndim != 2 or not logits.is_floating_point() or logits.stride(1) != 1:
        raise ValueError(f"logits must be floats [num_rows, vocab_size], dense in the last axis, got {logits.shape}")
    if bitmask.ndim != 2 or bitmask.dtype != torch.int32 or not bitmask.is_contiguous():
        raise ValueError(
            f"bitmask must be contiguous int32 [num_masks, num_words], got {bitmask.shape} {bitmask.dtype}"
        )
    if mask_rows is None:
        if bitmask.shape[0] != logits.shape[0]:
            raise ValueError(f"{bitmask.shape[0]} masks for {logits.shape[0]} rows of logits: name them by mask_rows")
    elif mask_rows.shape != logits.shape[:1] or mask_rows.dtype != torch.int32 or not mask_rows.is_contiguous():
        raise ValueError(
            f"mask_rows must be contiguous int32 [{logits.shape[0]}], got {tuple(mask_rows.shape)} {mask_rows.dtype}"
        )


def _apply_in_torch(logits: torch.Tensor, bitmask: torch.Tensor, mask_rows: torch.Tensor | None) -> None:
    vocab_size = logits.shape[1]
    words = bitmask if mask_rows is None else bitmask[mask_rows.clamp(min=0).long()]  # [num_rows, num_words]
    bits = (words[:, :, None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)) & 1
    allowed = bits.flatten(1)[:, :vocab_size].bool()
    if allowed.shape[1] < vocab_size:
        allowed = torch.nn.functional.pad(allowed, (0, vocab_size - allowed.shape[1]))
    if mask_rows is not None:
        allowed |= (mask_rows < 0)[:, None]
    logits.masked_fill_(~allowed, -torch.inf)
