"""Ending a constrained text within a budget: when few tokens are left, only those after which the rest still fits are allowed.

A row whose budget is too small from the start takes one of the shortest ways. Device-agnostic; nothing goes through the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel.structured.distance import Distances
from hf_accel.structured.mask_table import MaskTable
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import TokenFsm

_CHUNK = 1 << 20  # logits that are worked on at once


class Closing:
    """One automaton's distances beside its table.

    Args:
        fsm: the automaton.
        table: where its rows' states are from.
    """

    def __init__(self, fsm: TokenFsm, table: MaskTable) -> None:
        self.distances: Distances = fsm.distances
        self._fsm, self._arena, device = fsm, table, table.device
        self._classes = torch.from_numpy(fsm.classes).to(device)  # [vocab_size]
        self._table = torch.from_numpy(fsm.table).to(device)  # [num_states, num_classes]
        self._counts = torch.from_numpy(fsm.counts).to(device)  # [num_states, num_classes]
        self._values = torch.from_numpy(self.distances.values).to(device)
        self._of_state = torch.from_numpy(self.distances.of_state).to(device)  # [num_states, 4]

    def may_bind(self, remaining: int) -> bool:
        """Whether anything can be forbidden to a row that has so many tokens left, the end of sequence included."""
        return remaining <= self.distances.farthest

    def apply(self, logits: Tensor, states: Tensor, remaining: Tensor) -> None:
        """Forbid, in place, what would not leave enough tokens to end.

        Args:
            logits: [num_rows, vocab_size], already without what the rows' states do not allow; written.
            states: [num_rows] int64, each of this automaton.
            remaining: [num_rows] int64, how many tokens each row may still have, the end of sequence included.
        """
        classes = self._classes[: logits.shape[1]]
        step = max(_CHUNK // logits.shape[1], 1)
        for start in range(0, logits.shape[0], step):
            part = slice(start, start + step)
            too_far = self._too_far(states[part], remaining[part])
            if logits.device.type == "cpu" and not bool(too_far.any()):
                continue
            logits[part, : len(classes)].masked_fill_(too_far.index_select(1, classes), -torch.inf)

    def _too_far(self, states: Tensor, remaining: Tensor) -> Tensor:
        """[num_rows, num_classes] bool."""
        state, count = self._arena.within(self._fsm, states)
        target, counts = self._table[state], self._counts[state]
        after = torch.where(counts & 1 == 1, 0, count[:, None]) + (counts >> 1)
        # A token that is allowed nowhere has no target: what this finds for it is of no account.
        distance = self._at(target.clamp(min=0), after)
        most = torch.maximum(remaining, self._at(state, count)).clamp(min=1) - 1
        return (distance > most[:, None]) & (target != DEAD)

    def _at(self, state: Tensor, count: Tensor) -> Tensor:
        base, low, high, high_span = self._of_state[state].unbind(-1)
        near_low = torch.minimum(count.clamp(min=0), low)
        return self._values[base + near_low + torch.minimum((count - high).clamp(min=0), high_span)]


def check_budget(fsm: object, max_new_tokens: int) -> None:
    """Raise StructureError if no text of the automaton ends within so many tokens, the end of sequence included."""
    if not isinstance(fsm, TokenFsm):
        raise StructureError(
            "only constraints of a finite automaton can be closed within a budget, no grammars and no recursive schemas: go "
            "without close_within_budget"
        )
    needed = fsm.distances.needed
    if needed > max_new_tokens:
        raise StructureError(
            f"the shortest text that satisfies the constraint takes {needed} tokens with its end of sequence, and only "
            f"{max_new_tokens} may be generated: allow at least {needed}"
        )
