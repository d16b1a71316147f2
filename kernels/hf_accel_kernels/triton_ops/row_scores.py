"""What the sampling kernels share: a row's scores as they are loaded, and floats as integers of the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-2139095041)  # `key_of(-inf)`


def mask_arguments(
    logits: torch.Tensor, bitmask: torch.Tensor | None, mask_rows: torch.Tensor | None
) -> tuple[torch.Tensor, int, int, torch.Tensor]:
    """The kernels' arguments for masks: table, stride and words of a mask, mask of each row; `logits` stands for none."""
    if bitmask is None:
        return logits, 0, 0, logits
    return bitmask, bitmask.stride(0), bitmask.shape[1], logits if mask_rows is None else mask_rows


@triton.jit
def load_scores(
    logits_ptr, words_ptr, masked, groups, wanted, temperature, vocab_size, num_words,
    HAS_MASK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A row's groups of tokens: logits over the temperature in float32, -inf where not allowed or not `wanted`; and the tokens.

    Both [number of groups, GROUP]; GROUP divides 32, so that a group has one word of a mask.
    """
    tokens = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = wanted[:, None] & (tokens < vocab_size)
    scores = tl.load(logits_ptr + tokens, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_MASK:
        places = groups * GROUP // 32
        words = tl.load(words_ptr + places, mask=wanted & (places < tl.where(masked, num_words, 0)), other=0)
        words = tl.where(masked, words, -1)
        scores = tl.where(((words[:, None] >> (tokens % 32)) & 1) != 0, scores, -float("inf"))
    return tl.div_rn(scores, tl.zeros_like(scores) + temperature), tokens


@triton.jit
def key_of(value):
    """A float32 scalar as an int64 whose order is that of floats (-0 is just below 0); NaN means nothing."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def float_of(key):
    """The float32 scalar of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
