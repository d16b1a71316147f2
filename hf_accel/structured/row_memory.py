"""What is known of rows of token ids, found again by a hash of their ids. On the device: nothing is read back.

A row is looked for among those of its own length, the latest first: so however far an assistant runs ahead, or how often a call
is made again, the row's own beginning is there.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

_SAME_LENGTH = 64  # steps that are looked at
_STEPS = 4096  # that are kept
_MULTIPLIER = -7046029254386353131  # odd, as int64


class RowMemory:
    """Rows of the last steps, each with the state and the number of generated tokens that it had then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._steps: dict[int, list[tuple[Tensor, Tensor, int]]] = {}  # by length: hashes, values, most generated
        self._order: deque[int] = deque()  # lengths of all steps, the oldest first

    def find(self, hashes: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(found [num_rows] bool, state [num_rows] int64, generated [num_rows] int64) of rows of `length` tokens."""
        steps = self._latest(length)
        if not steps:
            zeros = torch.zeros_like(hashes)
            return zeros.bool(), zeros, zeros
        known, values = torch.cat([h for h, _, _ in steps]), torch.cat([v for _, v, _ in steps])
        equal = hashes[:, None] == known[None]
        state, generated = values[equal.to(torch.uint8).argmax(dim=1)].unbind(1)
        return equal.any(dim=1), state, generated

    def most_generated(self, length: int) -> int:
        """The most tokens that a row of `length` tokens can have generated, as the host knows."""
        return max((1 + most for _, _, most in self._latest(length - 1)), default=0)

    def add(self, hashes: Tensor, length: int, states: Tensor, generated: Tensor, most: int | None = None) -> None:
        """Remember rows of `length` tokens; arguments as in `find`. `most` is the highest of `generated`, where steps before
        were done elsewhere."""
        most = self.most_generated(length) if most is None else most
        step = (hashes, torch.stack([states, generated], dim=1), most)
        with self._lock:
            self._steps.setdefault(length, []).append(step)
            self._order.append(length)
            if len(self._order) > _STEPS:
                oldest = self._order.popleft()
                del self._steps[oldest][0]
                if not self._steps[oldest]:
                    del self._steps[oldest]

    def _latest(self, length: int) -> list[tuple[Tensor, Tensor, int]]:
        with self._lock:
            return self._steps.get(length, [])[: -_SAME_LENGTH - 1 : -1]


def row_hashes(ids: Tensor, whose: Tensor) -> Tensor:
    """[num_rows] int64 of rows of ids [num_rows, length] int64, and of whose constraint each has [num_rows] int64: a polynomial
    in wrapping arithmetic of mixed ids."""
    mixed = (ids + 1) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    positions = torch.arange(ids.shape[1], device=ids.device)
    weights = ((positions + 1) * -7723592293110705685) | 1
    weights = (weights ^ (weights >> 31)) * _MULTIPLIER | 1
    return (mixed * weights).sum(dim=1) + ids.shape[1] + whose * _MULTIPLIER
