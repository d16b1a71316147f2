"""Rows of a batch whose masks the host computes: how these masks reach the scores, and where each row of a call stands.

A row's constraint knows nothing but its text, so where that begins is all that is remembered: by a hash of the row's tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_accel.structured.dynamic import DynamicGrammar, Matcher
from hf_accel.structured.mask_table import keep_alive
from hf_accel_kernels.token_bitmask import masked

_HISTORY = 64  # steps whose rows are remembered
Key = tuple[int, bytes]


class HostMasks:
    """Masks of some rows of a batch.

    Args:
        masks: one for each of `rows`, [num_words] int32.
        rows: indices in the batch.
        num_rows: of the batch.
        device: where the scores are.
    """

    def __init__(self, masks: Sequence[np.ndarray], rows: Sequence[int], num_rows: int, device: torch.device) -> None:
        mask_rows = np.full(num_rows, -1, dtype=np.int32)
        mask_rows[list(rows)] = np.arange(len(rows))
        self._masks, self._rows = _on_device(np.stack(masks), device), _on_device(mask_rows, device)

    def masked(self, scores: Tensor, *, may_be_lost: bool) -> Tensor:
        """A copy of scores [num_rows, vocab_size]; a row that edits had left none of its allowed tokens gets them all alike."""
        if may_be_lost:
            return keep_alive(self._allowed, scores, self._rows >= 0)
        return self._allowed(scores)

    def _allowed(self, scores: Tensor) -> Tensor:
        return masked(scores, self._masks, self._rows)


class DynamicRows:
    """Where the rows of a logits processor's calls stand in its dynamic constraints."""

    def __init__(self) -> None:
        self._history: list[
            dict[Key, int]
        ] = []  # where the output begins, by constraint and tokens of a row; latest last
        self._matchers: dict[Key, Matcher] = {}  # of the last step
        self._rows: list[tuple[int, DynamicGrammar, int]] = []  # of this step: (index, grammar, constraint)
        self._ids = np.zeros((0, 0), dtype=np.int64)

    def enter(self, input_ids: Tensor, grammars: dict[int, tuple[DynamicGrammar, int]]) -> list[bool]:
        """Take in a call's rows; whether each of the dynamic ones has ended, in order.

        Args:
            input_ids: [num_rows, length].
            grammars: of the dynamic rows by index, each with the number of its constraint.
        """
        ids = np.ascontiguousarray(input_ids.detach().cpu().numpy().astype(np.int64))
        self._ids, self._rows = ids, [(i, grammar, which) for i, (grammar, which) in grammars.items()]
        length = ids.shape[1]
        self._starts = []
        for index, _, which in self._rows:
            before = self._find((which, _digest(ids[index, :-1])))
            self._starts.append(length if before is None else before)
        self._place()
        return [matcher.done for matcher in self._placed]

    def knows(self, input_ids: Tensor, grammars: dict[int, tuple[DynamicGrammar, int]]) -> bool:
        """Whether one of the dynamic rows goes on from a row of an earlier step. Arguments as `enter`'s."""
        ids = np.ascontiguousarray(input_ids.detach().cpu().numpy().astype(np.int64))
        return any(self._find((which, _digest(ids[i, :-1]))) is not None for i, (_, which) in grammars.items())

    def remember(self, input_ids: Tensor, grammars: dict[int, tuple[DynamicGrammar, int]], start: int) -> None:
        """Rows of a step that was done elsewhere, whose outputs begin at `start`."""
        ids = np.ascontiguousarray(input_ids.detach().cpu().numpy().astype(np.int64))
        self._history.append({(which, _digest(ids[i])): start for i, (_, which) in grammars.items()})

    def restart(self) -> None:
        """The rows entered are prompts."""
        self._starts = [self._ids.shape[1]] * len(self._rows)
        self._matchers = {}
        self._place()

    def masks(self, device: torch.device) -> HostMasks:
        """What the rows entered allow. Raises StructureError where a grammar has no way on; see `Matcher.mask`."""
        step: dict[Key, int] = {}
        matchers: dict[Key, Matcher] = {}
        for (index, _, which), start, matcher in zip(self._rows, self._starts, self._placed, strict=True):
            key = (which, _digest(self._ids[index]))
            step[key] = start
            matchers[key] = matcher
        self._history.append(step)
        del self._history[:-_HISTORY]
        self._matchers = matchers
        return HostMasks([m.mask() for m in self._placed], [i for i, _, _ in self._rows], len(self._ids), device)

    def _find(self, key: Key) -> int | None:
        return next((step[key] for step in reversed(self._history) if key in step), None)

    def _place(self) -> None:
        """Give each row a matcher: that of the row it goes on from, or a copy of it, else a new one."""
        parents = [self._matchers.get((which, _digest(self._ids[index, :-1]))) for index, _, which in self._rows]
        taken: set[int] = set()
        self._placed: list[Matcher] = []
        for (_, grammar, _), parent in zip(self._rows, parents, strict=True):
            if parent is None:
                self._placed.append(grammar.matcher())
            else:  # none moves before all are there
                self._placed.append(parent.copy() if id(parent) in taken else parent)
                taken.add(id(parent))
        self._matchers = {}
        for (index, _, _), start, matcher in zip(self._rows, self._starts, self._placed, strict=True):
            matcher.move_to(self._ids[index, start:].tolist())


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
