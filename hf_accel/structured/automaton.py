"""Deterministic finite automata over bytes: built from syntax trees, minimal, and with set operations.

Owns what a syntax tree means: sets of byte strings, characters spelled in UTF-8 unless told otherwise. Knows no vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_accel.structured.charset import ByteRange, CharSet
from hf_accel.structured.nfa import DEAD, Nfa
from hf_accel.structured.syntax import Counter, CounterConflict, Fragment, Node, TooLarge

MAX_STATES = 50_000

Spelling = Callable[[CharSet], Iterable[tuple[ByteRange, ...]]]


@dataclass(frozen=True, eq=False)
class ByteDfa:
    """A minimal automaton whose every state leads to acceptance.

    Attributes:
        classes: [256] int32, the class of each byte: bytes of one class always lead to the same state.
        table: [num_states, num_classes] int32, the next state or DEAD; state 0 is where it starts.
        accepting: [num_states] bool.
        counters: of each state inside a counted text; None elsewhere. Alone, the table lets through texts of any count.
    """

    classes: np.ndarray
    table: np.ndarray
    accepting: np.ndarray
    counters: tuple[Counter | None, ...]

    @property
    def num_states(self) -> int:
        return int(self.table.shape[0])

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is accepted."""
        return not self.accepting.any()

    @cached_property
    def bytes_table(self) -> np.ndarray:
        """[num_states, 256] int32: the next state by byte."""
        return np.ascontiguousarray(self.table[:, self.classes])

    @cached_property
    def fragment(self) -> Fragment:
        """This automaton as a part of a syntax tree: `Language(dfa.fragment)`."""
        return Fragment(
            tuple(tuple(_runs(row)) for row in self.bytes_table.tolist()),
            tuple(np.flatnonzero(self.accepting).tolist()),
            self.counters,
        )

    def walk(self, data: bytes, state: int = 0) -> int:
        """The state after `data`, or DEAD."""
        return self.walk_counted(data, state, 0)[0]

    def walk_counted(self, data: bytes, state: int, count: int) -> tuple[int, int]:
        """(state, units of the counted text that it is in) after `data`; state DEAD where `data` is not allowed."""
        for byte in data:
            before, state = state, int(self.table[state, self.classes[byte]])
            if state == DEAD:
                break
            inside, after = self.counters[before], self.counters[state]
            if after is None:
                if inside is not None and count < inside.low:
                    return DEAD, 0
                count = 0
            elif inside is None:
                count = 0
            elif after.home:
                count += 1
            if after is not None and count + (not after.home) > after.high:
                return DEAD, 0
        return state, count

    def accepts(self, data: bytes) -> bool:
        """Whether the whole of `data` matches."""
        state = self.walk(data)
        return state != DEAD and bool(self.accepting[state])

    def __and__(self, other: ByteDfa) -> ByteDfa:
        """What both accept."""
        return _product(self, other, lambda a, b: a and b)

    def __or__(self, other: ByteDfa) -> ByteDfa:
        """What either accepts."""
        return _product(self, other, lambda a, b: a or b)

    def __sub__(self, other: ByteDfa) -> ByteDfa:
        """What this one accepts and the other does not."""
        return _product(self, other, lambda a, b: a and not b)


def compile_node(node: Node, *, spell: Spelling = CharSet.byte_sequences, max_states: int = MAX_STATES) -> ByteDfa:
    """The minimal automaton of a syntax tree.

    Args:
        node: the tree.
        spell: byte sequences of a set of characters, UTF-8 by default; a function that lives as long as the process.
        max_states: of the automaton before it is minimised.

    Raises:
        TooLarge: it has more states.
    """
    nfa = Nfa(lambda charset: _spelled(spell, charset), max_states=16 * max_states)
    return minimal(*nfa.determinize(*nfa.add(node), max_states))


@functools.lru_cache(maxsize=1024)
def _spelled(spell: Spelling, charset: CharSet) -> Fragment:
    nfa = Nfa(lambda _: Fragment((), (), ()), MAX_STATES)
    return minimal(*nfa.determinize(*nfa.add_sequences(spell(charset)), MAX_STATES)).fragment


def _runs(row: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first byte, last byte, next state) of bytes in a row that lead to the same state."""
    first = 0
    for byte in range(1, 257):
        if byte == 256 or row[byte] != row[first]:
            if row[first] != DEAD:
                yield first, byte - 1, row[first]
            first = byte


def minimal_of_rows(rows: Sequence[Mapping[int, int]], accepting: Collection[int], start: int) -> ByteDfa:
    """The minimal automaton of states given as byte -> next state."""
    order = [start, *(s for s in range(len(rows)) if s != start)]
    new_id = {state: i for i, state in enumerate(order)}
    table = np.full((len(rows), 256), DEAD, dtype=np.int64)
    for state, row in enumerate(rows):
        for byte, target in row.items():
            table[new_id[state], byte] = new_id[target]
    return minimal(np.arange(256), table, np.array([state in accepting for state in order]), [None] * len(rows))


def minimal(
    classes: np.ndarray, table: np.ndarray, accepting: np.ndarray, counters: Sequence[Counter | None]
) -> ByteDfa:
    """The minimal automaton equal to a complete description of one; arguments as the attributes of `ByteDfa`."""
    table, keep = _trim(table, accepting)
    accepting, counters = accepting[keep], [counters[int(i)] for i in np.flatnonzero(keep)]
    blocks = _equivalence(table, _labels(accepting, counters))
    _, first = np.unique(blocks, return_index=True)
    order = np.argsort(first, kind="stable")  # block ids in order of their first member: the start stays 0
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    renamed = np.append(rank, DEAD)  # DEAD indexes the last
    members = first[order]
    small = renamed[np.append(blocks, -1)[table[members]]]
    columns, back = np.unique(small, axis=1, return_inverse=True)
    return ByteDfa(
        back.reshape(-1)[classes].astype(np.int32),
        np.ascontiguousarray(columns, dtype=np.int32),
        accepting[members],
        tuple(counters[int(i)] for i in members),
    )


def _labels(accepting: np.ndarray, counters: Sequence[Counter | None]) -> np.ndarray:
    """[num_states] small ids of what states are told apart by before their ways on."""
    ids: dict[tuple[bool, Counter | None], int] = {}
    return np.array([ids.setdefault(pair, len(ids)) for pair in zip(accepting.tolist(), counters, strict=True)])


def _trim(table: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(table, which states are kept): without states that are not reached or lead nowhere; the start always stays."""
    alive = accepting.copy()
    while True:
        grown = alive | np.append(alive, False)[table].any(axis=1)
        if (grown == alive).all():
            break
        alive = grown
    reached = np.zeros(len(accepting), dtype=bool)
    frontier = np.array([0])
    while frontier.size:
        reached[frontier] = True
        after = np.unique(table[frontier])
        after = after[after >= 0]
        frontier = after[~reached[after] & alive[after]]
    keep = reached & alive
    keep[0] = True
    new_id = np.full(len(accepting) + 1, DEAD)
    new_id[:-1][keep] = np.arange(keep.sum())
    new_id[:-1][~alive] = DEAD
    return new_id[table[keep]], keep


def _equivalence(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[num_states] ids of states of one label that accept the same: Moore's refinement, on rows hashed with random weights."""
    random = np.random.default_rng(0)
    weights = random.integers(1, 1 << 62, size=table.shape[1], dtype=np.uint64) | np.uint64(1)
    blocks = np.unique(labels, return_inverse=True)[1].reshape(-1)
    count = int(blocks.max()) + 1
    with np.errstate(over="ignore"):
        while True:
            names = random.integers(0, 1 << 62, size=count + 1, dtype=np.uint64)
            next_names = names[np.append(blocks, count)[table]]  # [num_states, num_classes]
            rows = (next_names * weights).sum(axis=1) + names[blocks] * np.uint64(0x9E3779B97F4A7C15)
            _, refined = np.unique(rows, return_inverse=True)
            new_count = int(refined.max()) + 1
            if new_count == count:
                return blocks
            blocks, count = refined.reshape(-1), new_count


def _product(a: ByteDfa, b: ByteDfa, accept: Callable[[bool, bool], bool]) -> ByteDfa:
    """The automaton over pairs of states."""
    if any(a.counters) or any(b.counters):
        raise CounterConflict("a text of bounded length has another condition too")
    pairs, classes = np.unique(np.stack([a.classes, b.classes]), axis=1, return_inverse=True)
    table_a = np.vstack([a.table, np.full((1, a.table.shape[1]), DEAD, np.int32)])[:, pairs[0]]  # DEAD indexes the last
    table_b = np.vstack([b.table, np.full((1, b.table.shape[1]), DEAD, np.int32)])[:, pairs[1]]
    ids: dict[tuple[int, int], int] = {(0, 0): 0}
    todo, rows, accepting = [(0, 0)], [], []
    accepts_a, accepts_b = [*a.accepting.tolist(), False], [*b.accepting.tolist(), False]
    for state_a, state_b in todo:
        accepting.append(accept(accepts_a[state_a], accepts_b[state_b]))
        row = []
        for pair in zip(table_a[state_a].tolist(), table_b[state_b].tolist(), strict=True):
            if pair == (DEAD, DEAD):
                row.append(DEAD)
                continue
            if pair not in ids:
                if len(ids) >= MAX_STATES:
                    raise TooLarge(f"the constraint needs more than {MAX_STATES} states: make it simpler")
                ids[pair] = len(ids)
                todo.append(pair)
            row.append(ids[pair])
        rows.append(row)
    return minimal(
        classes.reshape(-1), np.array(rows, dtype=np.int64), np.array(accepting, dtype=bool), [None] * len(rows)
    )
