"""Rows of a batch that must come to their end soon: the host knows how many tokens each has left, the device where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.engine.upload import upload
from hf_accel.structured.closing import Closing


@dataclass(frozen=True)
class Budget:
    """Where a request must have ended: `max_total_tokens` of its prompt and output, the end of sequence included."""

    closing: Closing
    max_total_tokens: int

    def near(self, length: int) -> bool:
        """Whether the end is so near, after `length` tokens, that it may forbid some of the next."""
        return self.closing.may_bind(self.max_total_tokens - length)


class ClosingRows:
    """Those of a batch whose end is near."""

    def __init__(self, states: Tensor, parts: list[tuple[Closing, Tensor, Tensor]]) -> None:
        self._states = states  # [num_rows] of the batch
        self._parts = parts  # for each automaton: rows [n] int64, and the tokens that each has left

    @classmethod
    def among(cls, budgets: Sequence[Budget | None], lengths: Sequence[int], states: Tensor) -> ClosingRows | None:
        """Those of some rows that have so many tokens and are in these states; None if there are none."""
        near: dict[Closing, list[tuple[int, int]]] = {}
        for i, (budget, length) in enumerate(zip(budgets, lengths, strict=True)):
            if budget is not None and budget.near(length):
                near.setdefault(budget.closing, []).append((i, budget.max_total_tokens - length))
        if not near:
            return None
        parts = [
            (closing, *upload([list(pair) for pair in zip(*rows, strict=True)], torch.long, states.device).unbind(0))
            for closing, rows in near.items()
        ]
        return cls(states, parts)

    def apply(self, logits: Tensor) -> None:
        """Forbid, in place, what leaves too few tokens; logits [num_rows, vocab_size] with the states' masks applied."""
        for closing, rows, remaining in self._parts:
            own = logits.index_select(0, rows)
            closing.apply(own, self._states.index_select(0, rows), remaining)
            logits.index_copy_(0, rows, own)
