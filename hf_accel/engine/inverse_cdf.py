"""Draws tokens at given numbers: a counter-based random number for each (seed, position), and the inverse of a distribution.

Owns the reproducibility of seeded sampling. Knows nothing of parameters, rows or batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # tokens of one block in the search of the distribution function


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (splitmix64, Steele et al. 2014, as a counter hash)."""
    state = _splitmix64(_splitmix64(seed) + position)
    return (state >> 11) * 2.0**-53


def invert(probs: Tensor, numbers: Tensor) -> Tensor:
    """The first token at which the sum of probabilities exceeds a number: by blocks of tokens, then inside one block.

    Args:
        probs: [num_rows, vocab_size] float32, of any positive sum.
        numbers: [num_rows, 1] float64 in [0, 1), as shares of that sum.

    Returns:
        [2, num_rows] int64: token ids, and 0 where the sum is NaN or 0.
    """
    vocab_size = probs.shape[1]
    num_whole = vocab_size // _BLOCK
    whole, tail = probs[:, : num_whole * _BLOCK], probs[:, num_whole * _BLOCK :]
    sums = [
        whole.reshape(len(probs), num_whole, _BLOCK).sum(dim=-1, dtype=torch.float64),
        tail.sum(-1, True, dtype=torch.float64),
    ]
    up_to_block = torch.cat(sums, dim=1).cumsum(dim=-1)  # [num_rows, num_whole + 1]
    total = up_to_block[:, -1:]
    # Strictly below the total: the first sum above the goal then always ends in a token of positive probability.
    goal = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(up_to_block, goal, right=True).clamp(max=num_whole)  # [num_rows, 1]
    before = torch.where(block > 0, up_to_block.gather(1, (block - 1).clamp(min=0)), 0.0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)  # [num_rows, block]
    inside = probs.gather(1, ids.clamp(max=vocab_size - 1)).double().masked_fill(ids >= vocab_size, 0.0)
    offset = torch.searchsorted(before + inside.cumsum(dim=-1), goal, right=True)
    # Rounding may put the goal past the block's own sum: then it is the block's last possible token.
    last = torch.where(inside > 0, ids, -1).amax(dim=-1, keepdim=True)
    token_ids = torch.minimum(block * _BLOCK + offset, last).clamp(min=0)
    return torch.stack([token_ids[:, 0], (total[:, 0] > 0).long()])


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % (1 << 64)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    return value ^ (value >> 31)
