"""How near a text is to its end: from each state of a token automaton, the fewest tokens to a complete text and its end of sequence.

Within a counted text the distance depends on the count: below the least count, and near the highest, each count has a distance of
its own; those between share one. Knows no tensors: `closing.py` puts it on a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_accel.structured.nfa import DEAD
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.vocabulary import expand

if TYPE_CHECKING:
    from hf_accel.structured.token_fsm import TokenFsm

FAR = 1 << 30  # from where no text ends
MAX_WAYS = 1 << 25  # (state, count, class) looked at
_NEAR = 4  # counts below the highest that are told apart at first


@dataclass(frozen=True, eq=False)
class Distances:
    """Of one automaton.

    Attributes:
        values: [num_values] int32, tokens to the end, the end of sequence counted; FAR where there is no way.
        of_state: [num_states, 4] int32 (base, low, high, high_span): a state's value for a count is
            base + clip(count, 0, low) + clip(count - high, 0, high_span).
        needed: tokens of the shortest text, the end of sequence counted.
        farthest: the largest of `values` that is not FAR.
    """

    values: np.ndarray
    of_state: np.ndarray
    needed: int
    farthest: int

    def at(self, state: int, count: int = 0) -> int:
        """Tokens to the end from here."""
        return int(self.values[_index(self.of_state[state], np.array(count))])


def find_distances(fsm: TokenFsm) -> Distances:
    """The distances of an automaton.

    Raises:
        StructureError: texts of a bounded length are so long, and so many, that their distances fill too much memory.
    """
    bounds = _Bounds(fsm)
    near = _NEAR
    while True:
        of_state = bounds.of_state(near)
        values = _search(fsm, bounds, of_state)
        first = of_state[:, 0] + of_state[:, 1]
        apart = of_state[:, 3] > 0
        # A way on at one count is a way on at a lower one that is above the least. So if the first of the counts near the
        # highest is as near to the end as where no highest count is in sight, all those between are.
        if (values[first[apart] + 1] == values[first[apart]]).all():
            break
        near *= 2
    start = int(values[_index(of_state[fsm.start], np.array(0))])
    return Distances(values, of_state.astype(np.int32), start, int(values[values < FAR].max()))


class _Bounds:
    """Of each state's count: [num_states] int64 arrays, 0 outside of counted texts."""

    def __init__(self, fsm: TokenFsm) -> None:
        _, low, low_span, high, high_span = fsm.row_of.astype(np.int64).T
        self.depth = high_span  # units that one token may need
        self.least = low + low_span
        self.most = high + high_span

    def of_state(self, near: int) -> np.ndarray:
        """`Distances.of_state` with `near` counts below the highest told apart, or all counts where there are few."""
        few = self.most - self.least <= self.depth + near
        low, span = np.where(few, self.most, self.least), np.where(few, 0, near)
        base = np.cumsum(low + span + 1) - (low + span + 1)
        return np.stack([base, low, self.most - span, span], axis=1)


def _index(of_state: np.ndarray, count: np.ndarray) -> np.ndarray:
    base, low, high, high_span = np.moveaxis(of_state, -1, 0)
    index: np.ndarray = base + np.clip(count, 0, low) + np.clip(count - high, 0, high_span)
    return index


def _search(fsm: TokenFsm, bounds: _Bounds, of_state: np.ndarray) -> np.ndarray:
    """[num_values] int32: breadth first, backwards from the end."""
    sizes = of_state[:, 1] + of_state[:, 3] + 1
    num_values, num_classes = int(sizes.sum()), fsm.table.shape[1]
    if num_values * num_classes > MAX_WAYS:
        raise StructureError(
            f"close_within_budget needs {num_values} distances of {num_classes} kinds of tokens: ask for shorter texts "
            "(minLength), or go without it"
        )
    state = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(num_values) - of_state[state, 0]
    count = np.where(place <= of_state[state, 1], place, place - of_state[state, 1] + of_state[state, 2])
    source, symbol = np.nonzero(_allowed(fsm, state, count))
    target, (value, sets) = fsm.table[state[source], symbol], np.divmod(fsm.counts[state[source], symbol], 2)
    after = _index(of_state[target], value + np.where(sets == 1, 0, count[source]))
    ways = np.unique(after * num_values + source)
    after, source = np.divmod(ways, num_values)
    first = np.searchsorted(after, np.arange(num_values + 1))

    values = np.full(num_values, FAR, dtype=np.int32)
    frontier, distance = np.zeros(1, dtype=np.int64), 0  # DONE
    values[0] = 0
    while frontier.size:
        distance += 1
        before = source[expand(first, frontier)[1]]
        frontier = np.unique(before[values[before] == FAR])
        values[frontier] = distance
    return values


def _allowed(fsm: TokenFsm, state: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[num_values, num_classes] bool: the classes that these states and counts allow."""
    base, low, low_span, high, high_span = fsm.row_of[state].astype(np.int64).T
    mask = fsm.rows[base + np.clip(count - low, 0, low_span) + np.clip(count - high, 0, high_span)]
    present, member = np.unique(fsm.classes, return_index=True)
    bits = fsm.masks.view(np.uint32)[:, member // 32] >> (member % 32).astype(np.uint32) & 1  # [num_masks, present]
    of_class = np.zeros((len(fsm.masks), fsm.table.shape[1]), dtype=bool)
    of_class[:, present] = bits
    allowed: np.ndarray = of_class[mask] & (fsm.table[state] != DEAD)
    return allowed
