"""Token automata on a device: one arena for all that are in use, and the state of each row as one number.

A row's state is a global id with a count: DONE after its end, FREE for a row without a constraint. Masking and advancing read the arena
only; nothing goes through the host.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_accel.structured.token_fsm import TokenFsm
from hf_accel_kernels.token_bitmask import apply_token_bitmask, masked
from hf_accel_kernels.token_states import COUNT_SHIFT, FIELDS, advance, mask_rows

FREE = -1
DONE = 0
_COUNT_SHIFT = COUNT_SHIFT  # a row's state is its global id below, its count above
_STATE_BITS = (1 << _COUNT_SHIFT) - 1


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
            1, FIELDS, dtype=torch.int64, device=device
        )  # [num_states, (automaton, first move, *row_of)]
        self.rows = torch.zeros(1, dtype=torch.int32, device=device)  # mask by row
        self.moves = torch.ones(1, 2, dtype=torch.int32, device=device)  # (next global state, count) by state and class

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.masks, self.classes, self.states, self.rows, self.moves))

    def start(self, fsm: TokenFsm) -> int:
        """The global state in which a row of this automaton starts; adds it when it is new."""
        if id(fsm) not in self._starts:
            self._starts[id(fsm)] = self._add(fsm.widened(self.classes.shape[1]))
            self._kept.append(fsm)
        return self._starts[id(fsm)]

    def global_state(self, fsm: TokenFsm, state: int, count: int) -> int:
        """What a row's state is here, given in the automaton's own terms."""
        return DONE if state <= DONE else self.start(fsm) - fsm.start + state + (count << _COUNT_SHIFT)

    def within(self, fsm: TokenFsm, states: Tensor) -> tuple[Tensor, Tensor]:
        """(state of the automaton, count) of rows that are in it, [num_rows] int64 each."""
        first = self.start(fsm) - fsm.start
        return ((states & _STATE_BITS) - first).clamp(min=DONE), states >> _COUNT_SHIFT

    def apply(self, logits: Tensor, states: Tensor) -> None:
        """Forbid, in place, what the rows' states do not allow; logits [num_rows, vocab_size], states [num_rows] int64."""
        apply_token_bitmask(logits, self.masks, self._mask_rows(states))

    def masked(self, logits: Tensor, states: Tensor) -> Tensor:
        """`apply` to a copy."""
        return masked(logits, self.masks, self._mask_rows(states))

    def _mask_rows(self, states: Tensor) -> Tensor:
        return mask_rows(states, self.states, self.rows)

    def advance(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """The states after a token each [num_rows] int64. A token that was not allowed ends its row."""
        return advance(states, token_ids, self.states, self.classes, self.moves)

    def _add(self, fsm: TokenFsm) -> int:
        """DONE is shared: local state s >= 1 becomes global state base + s - 1."""
        base, first = self.states.shape[0], self.moves.shape[0]
        num_states, num_classes = fsm.table.shape
        dead = fsm.table[1:] <= 0  # what is not allowed ends the row
        moves = np.empty((num_states - 1, num_classes, 2), dtype=np.int32)
        moves[..., 0], moves[..., 1] = (
            np.where(dead, DONE, fsm.table[1:] + (base - 1)),
            np.where(dead, 1, fsm.counts[1:]),
        )
        states = np.empty((num_states - 1, FIELDS), dtype=np.int64)
        states[:, 0] = self.classes.shape[0]
        states[:, 1] = first + np.arange(num_states - 1) * num_classes
        states[:, 2:] = fsm.row_of[1:]
        states[:, 2] += self.rows.shape[0]
        self.states = torch.cat([self.states, self._on_device(states)])
        self.rows = torch.cat([self.rows, self._on_device(fsm.rows + np.int32(self.masks.shape[0]))])
        self.masks = torch.cat([self.masks, self._on_device(fsm.masks)])
        self.classes = torch.cat([self.classes, self._on_device(fsm.classes[None])])
        self.moves = torch.cat([self.moves, self._on_device(moves.reshape(-1, 2))])
        return base + fsm.start - 1

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def mask_and_keep_alive(
    table: MaskTable, scores: Tensor, states: Tensor, close: Callable[[Tensor], None] | None = None
) -> Tensor:
    """`table.masked`; a row that others had left none of its allowed tokens gets them all alike: the constraint wins.

    `close` forbids more, in place.
    """

    def allowed(values: Tensor) -> Tensor:
        masked = table.masked(values, states)
        if close is not None:
            close(masked)
        return masked

    return keep_alive(allowed, scores, states >= 0)


def keep_alive(allowed: Callable[[Tensor], Tensor], scores: Tensor, constrained: Tensor) -> Tensor:
    """`allowed(scores)`, a copy with what is not allowed at -inf; a constrained row [num_rows] bool of which nothing is left gets
    all that is allowed alike."""
    masked = allowed(scores)
    lost = (masked.amax(dim=-1, keepdim=True) == -torch.inf) & constrained[:, None]
    if scores.device.type == "cuda" or bool(lost.any()):
        masked = torch.where(lost, allowed(torch.zeros_like(scores)), masked)
    return masked
