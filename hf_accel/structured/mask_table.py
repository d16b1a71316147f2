"""Token automata on a device: one arena for all that are in use, and the state of each row as one number.

A row's state is a global id: DONE after its end, FREE for a row without a constraint. Masking and advancing read the arena
only; nothing goes through the host.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_accel.structured.token_fsm import TokenFsm
from hf_accel_kernels.token_bitmask import apply_token_bitmask, masked

FREE = -1
DONE = 0


class MaskTable:
    """The arena of one vocabulary on one device.

    Global state 0 is DONE for every automaton. Automata are added once and stay.

    Args:
        vocab_size: width of the logits.
        eos_token_ids: what is allowed after the end.
        device: where the rows are.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self.device = device
        num_words = -(-vocab_size // 32)
        end = np.zeros(num_words * 32, dtype=np.uint8)
        end[list(eos_token_ids)] = 1
        self._starts: dict[int, int] = {}
        self._kept: list[TokenFsm] = []  # so that no id is used twice
        self.masks = self._on_device(np.packbits(end, bitorder="little").view(np.int32)[None])  # [num_masks, num_words]
        self.classes = torch.zeros(1, vocab_size, dtype=torch.int32, device=device)  # [num_automata + 1, vocab_size]
        self.states = torch.zeros(
            1, 3, dtype=torch.int64, device=device
        )  # [num_states, (mask, automaton, first in next)]
        self.next = torch.zeros(1, dtype=torch.int32, device=device)  # next global state, by state and class

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.masks, self.classes, self.states, self.next))

    def start(self, fsm: TokenFsm) -> int:
        """The global state in which a row of this automaton starts; adds it when it is new."""
        if id(fsm) not in self._starts:
            self._starts[id(fsm)] = self._add(fsm)
            self._kept.append(fsm)
        return self._starts[id(fsm)]

    def apply(self, logits: Tensor, states: Tensor) -> None:
        """Forbid, in place, what the rows' states do not allow; logits [num_rows, vocab_size], states [num_rows] int64."""
        apply_token_bitmask(logits, self.masks, self._mask_rows(states))

    def masked(self, logits: Tensor, states: Tensor) -> Tensor:
        """`apply` to a copy."""
        return masked(logits, self.masks, self._mask_rows(states))

    def _mask_rows(self, states: Tensor) -> Tensor:
        return torch.where(states >= 0, self.states[states.clamp(min=0), 0], FREE).to(torch.int32)

    def advance(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """The states after a token each [num_rows] int64. A token that was not allowed ends its row."""
        known = self.states[states.clamp(min=0)]  # [num_rows, 3]
        index = known[:, 2] + self.classes[known[:, 1], token_ids.clamp(max=self.classes.shape[1] - 1)]
        after = torch.where(states == DONE, DONE, self.next[index].long())
        return torch.where(states < 0, states, after)

    def _add(self, fsm: TokenFsm) -> int:
        """DONE is shared: local state s >= 1 becomes global state base + s - 1."""
        base, num_masks, first = self.states.shape[0], self.masks.shape[0], self.next.shape[0]
        num_classes = fsm.table.shape[1]
        after = np.where(fsm.table[1:] > 0, fsm.table[1:] + (base - 1), DONE)  # what is not allowed ends the row
        states = np.empty((fsm.num_states - 1, 3), dtype=np.int64)
        states[:, 0] = num_masks + fsm.mask_of[1:]
        states[:, 1] = self.classes.shape[0]
        states[:, 2] = first + np.arange(fsm.num_states - 1) * num_classes
        self.states = torch.cat([self.states, self._on_device(states)])
        self.masks = torch.cat([self.masks, self._on_device(fsm.masks)])
        self.classes = torch.cat([self.classes, self._on_device(fsm.classes[None])])
        self.next = torch.cat([self.next, self._on_device(after.astype(np.int32).reshape(-1))])
        return base + fsm.start - 1

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
