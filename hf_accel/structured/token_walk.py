"""Every token from every state of a byte automaton: where it leads, what it does to the count of a counted text, and which
counts allow it.

What a token does, from all states at once, is one function: its column. Tokens have few different ones, and so have their
beginnings. The walk goes through the vocabulary's trie by length and computes each column once, whichever tokens have it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from hf_accel.structured.automaton import ByteDfa
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.syntax import TooLarge
from hf_accel.structured.time_limit import check_time
from hf_accel.structured.vocabulary import TokenTrie, expand

CHUNK = 1 << 20  # ways that are followed at once
MAX_ENTRIES = 1 << 26  # of all columns
NEVER = -1
NONE = 0  # the column of what no state allows
_UNKNOWN = -1
_BITS = 21  # of a state and of a count, in one number


@dataclass(frozen=True, eq=False)
class Moves:
    """What tokens do: one entry for each column and state that some count allows. Entries are in the order of their columns.

    Attributes:
        token: [num_tokens] int64, ids of the tokens that are allowed somewhere.
        column_of: [num_tokens] int64, the column of each.
        column, state, target: [num_moves] int64.
        value: units that the token adds to the count, or with `sets` the count that it leaves.
        sets: [num_moves] bool.
        need: units that must be left of the counted text that `state` is in.
        leaves: units that the text has gained when the token ends it, which must make at least its lower bound; NEVER where
            the token stays inside, or `state` is in no counted text.
    """

    token: np.ndarray
    column_of: np.ndarray
    column: np.ndarray
    state: np.ndarray
    target: np.ndarray
    value: np.ndarray
    sets: np.ndarray
    need: np.ndarray
    leaves: np.ndarray

    def where(self, kept: np.ndarray) -> Moves:
        """Without those entries that are not `kept`."""
        names = ("column", "state", "target", "value", "sets", "need", "leaves")
        return Moves(self.token, self.column_of, *(getattr(self, name)[kept] for name in names))


def walk_tokens(dfa: ByteDfa, trie: TokenTrie) -> Moves:
    """Run every token from every state.

    Raises:
        TooLarge: there are more columns than memory is given to, or the time is over.
    """
    columns = _Columns(dfa)
    column_of = np.full(trie.num_nodes, NONE, dtype=np.int64)  # of the text that leads to a node
    column_of[0] = columns.identity
    symbols = dfa.classes[trie.byte]
    for first, end in itertools.pairwise(trie.levels[1:]):
        before = column_of[trie.parent[first:end]]
        live = np.flatnonzero(before != NONE)
        if not len(live):
            break
        column_of[first + live] = columns.after(before[live], symbols[first + live])
    of_token = column_of[trie.node]
    live = of_token != NONE
    used, column_of = np.unique(of_token[live], return_inverse=True)
    return columns.moves(trie.token[live], used, column_of.reshape(-1))


def hash_columns(first: np.ndarray, *fields: np.ndarray) -> list[tuple[int, int]]:
    """A name for each set of entries: those of set i begin at first[i], and the last ones end at first[-1].

    Sets are compared by two sums of 64-bit hashes, one for each entry: unequal ones agree with odds of 2^-100.
    """
    random = np.random.default_rng(0)
    sums = []
    for _ in range(2):
        mixed = np.full(int(first[-1]), random.integers(1, 1 << 63, dtype=np.uint64))
        for field in fields:
            mixed += field.astype(np.uint64) * (random.integers(1, 1 << 63, dtype=np.uint64) | np.uint64(1))
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed)])
        sums.append((total[first[1:]] - total[first[:-1]]).tolist())
    return list(zip(*sums, strict=True))


class _Columns:
    """The columns found so far. Column 0 has no entry: no state allows what leads to it.

    An entry has a state, where the text leads from there, and how the count stands: `count` is of the first state's counted text until
    that ends (`left`), then of the present one.
    """

    def __init__(self, dfa: ByteDfa) -> None:
        self._table, self._limits = dfa.table, _Limits(dfa)
        self._num_symbols = dfa.table.shape[1]
        self._num_entries = 0
        self._origin = np.empty(CHUNK >> 4, dtype=np.int32)  # both of entries by column; grow
        self._place = np.empty(CHUNK >> 4, dtype=np.int64)
        self._first = [0, 0]  # where each column's entries begin
        self._next = np.full(64 * self._num_symbols, _UNKNOWN, dtype=np.int32)  # by column and symbol
        self._ids: dict[tuple[int, int], int] = {(0, 0): NONE}
        states = np.arange(dfa.num_states)
        left = ~self._limits.inside
        places = (
            _pack(states, np.zeros_like(states), left, np.full_like(states, NEVER)) if any(dfa.counters) else states
        )
        self.identity = self._add(np.array([0, len(states)]), states.astype(np.int32), places)[0]

    def after(self, columns: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """The columns of texts that go on by one byte each, of the class `symbols`."""
        steps = columns * self._num_symbols + symbols
        unknown = np.unique(steps[self._next[steps] == _UNKNOWN])
        if len(unknown):
            first = np.array(self._first)
            sizes = first[unknown // self._num_symbols + 1] - first[unknown // self._num_symbols]
            cuts = np.searchsorted(np.cumsum(sizes), np.arange(CHUNK, int(sizes.sum()), CHUNK))
            for some in np.split(unknown, np.unique(cuts)):
                if len(some):
                    self._follow(some, first)
        after: np.ndarray = self._next[steps]
        return after

    def _follow(self, steps: np.ndarray, first: np.ndarray) -> None:
        check_time()
        columns, symbols = np.divmod(steps, self._num_symbols)
        owner, entry = expand(first, columns)
        origin, place = self._origin[entry], self._place[entry]
        counted = self._limits.any
        state = place & ((1 << _BITS) - 1) if counted else place
        after = self._table[state, symbols[owner]]
        live = np.flatnonzero(after != DEAD)
        owner, origin, after = owner[live], origin[live], after[live].astype(np.int64)
        if counted:
            place, kept = self._limits.step(origin, place[live], after)
            owner, origin, place = owner[kept], origin[kept], place[kept]
        else:
            place = after
        bounds = np.searchsorted(owner, np.arange(len(steps) + 1))
        self._next[steps] = self._add(bounds, origin, place)

    def _add(self, bounds: np.ndarray, origin: np.ndarray, place: np.ndarray) -> list[int]:
        """Ids of columns, entries given: those that are new are kept."""
        names = hash_columns(bounds, origin, place)
        sizes, new = np.diff(bounds), []
        ids = []
        for i, (name, size) in enumerate(zip(names, sizes.tolist(), strict=True)):
            if name not in self._ids:
                self._ids[name] = len(self._first) - 1
                self._first.append(self._first[-1] + size)
                new.append(i)
            ids.append(self._ids[name])
        if new:
            _, entry = expand(bounds, np.array(new))
            self._append(origin[entry], place[entry])
        return ids

    def _append(self, origin: np.ndarray, place: np.ndarray) -> None:
        end = self._num_entries + len(origin)
        if end > MAX_ENTRIES:
            raise TooLarge(
                "the constraint's automaton over this vocabulary needs too much memory: make it simpler, or use smaller bounds"
            )
        if end > len(self._origin):
            self._origin = np.resize(self._origin, 2 * end)
            self._place = np.resize(self._place, 2 * end)
        self._origin[self._num_entries : end], self._place[self._num_entries : end] = origin, place
        self._num_entries = end
        cells = len(self._first) * self._num_symbols
        if cells > len(self._next):
            self._next = np.concatenate([self._next, np.full(2 * cells - len(self._next), _UNKNOWN, dtype=np.int32)])

    def moves(self, token: np.ndarray, used: np.ndarray, column_of: np.ndarray) -> Moves:
        """What tokens do that have the columns `used`, numbered by their places there."""
        column, entry = expand(np.array(self._first), used)
        origin, place = self._origin[entry].astype(np.int64), self._place[entry]
        if not self._limits.any:
            zeros = np.zeros(len(place), dtype=np.int64)
            return Moves(token, column_of, column, origin, place, zeros, zeros == 0, zeros, np.full_like(place, NEVER))
        state, count, left, leaves = _unpack(place)
        in_origins_text = self._limits.inside[origin] & ~left
        need = np.where(in_origins_text, count + ~self._limits.home[state], np.maximum(leaves, 0))
        return Moves(token, column_of, column, origin, state, count, left, need, leaves)


class _Limits:
    """The counters of an automaton's states as arrays."""

    def __init__(self, dfa: ByteDfa) -> None:
        self.any = any(dfa.counters)
        self.inside = np.array([c is not None for c in dfa.counters])
        self.home = np.array([c is not None and c.home for c in dfa.counters])
        self.low = np.array([0 if c is None else c.low for c in dfa.counters], dtype=np.int64)
        self.high = np.array([0 if c is None else c.high for c in dfa.counters], dtype=np.int64)

    def step(self, origin: np.ndarray, place: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places, which of them some count allows) of ways that have come to the states `after`."""
        before, count, left, leaves = _unpack(place)
        was, now = self.inside[before], self.inside[after]
        ends, begins = was & ~now, ~was & now
        count = count + (was & self.home[after])
        leaves = np.where(ends & ~left, count, leaves)
        # Texts that begin inside the token have a known count: bounds are checked here and now.
        wrong = ends & left & (count < self.low[before])
        left = left | ends
        count = np.where(ends | begins, 0, count)
        more = count + ~self.home[after]
        wrong |= now & (more > np.where(left, self.high[after], self.high[origin]))
        return _pack(after, count, left, leaves), np.flatnonzero(~wrong)


def _pack(state: np.ndarray, count: np.ndarray, left: np.ndarray, leaves: np.ndarray) -> np.ndarray:
    """State, count, whether its first text is left, and how that was, in one number."""
    place: np.ndarray = state | count << _BITS | (leaves + 1) << 2 * _BITS | np.where(left, np.int64(-1) << 63, 0)
    return place


def _unpack(place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    mask = (1 << _BITS) - 1
    return place & mask, place >> _BITS & mask, place < 0, (place >> 2 * _BITS & mask) - 1
