"""Deterministic finite automata over bytes: built from syntax trees, minimal, and with set operations.

Owns what a syntax tree means: sets of byte strings, characters spelled in UTF-8 unless told otherwise. Knows no vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_accel.structured.charset import ByteRange, CharSet
from hf_accel.structured.nfa import DEAD, Nfa
from hf_accel.structured.syntax import Counter, CounterConflict, Fragment, Node, TooLarge
from hf_accel.structured.texts import shared_texts
from hf_accel.structured.time_limit import check_time

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
            _runs(self.bytes_table),
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
    nfa.check_size(node)
    return minimal(*nfa.determinize(*nfa.add(node), max_states))


@functools.lru_cache(maxsize=1024)
def _spelled(spell: Spelling, charset: CharSet) -> Fragment:
    nfa = Nfa(lambda _: Fragment((), (), ()), MAX_STATES)
    return minimal(*nfa.determinize(*nfa.add_sequences(spell(charset)), MAX_STATES)).fragment


def _runs(table: np.ndarray) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """(first byte, last byte, next state) of bytes that lead to the same state, for each row of [num_states, 256]."""
    edge = np.ones((len(table), 257), dtype=bool)
    edge[:, 1:256] = table[:, 1:] != table[:, :-1]
    state, first = np.nonzero(edge[:, :256])
    _, end = np.nonzero(edge[:, 1:])
    target = table[state, first]
    live = target != DEAD
    state = state[live]
    runs = list(zip(first[live].tolist(), end[live].tolist(), target[live].tolist(), strict=True))
    cuts = np.searchsorted(state, np.arange(len(table) + 1)).tolist()
    return tuple(tuple(runs[low:high]) for low, high in itertools.pairwise(cuts))


def compile_texts(texts: Iterable[bytes]) -> ByteDfa:
    """The minimal automaton of some byte strings, however many.

    Raises:
        TooLarge: it has more than MAX_STATES states.
    """
    rows, accepting = shared_texts(texts, MAX_STATES)
    table = np.full((len(rows), 256), DEAD, dtype=np.int32)
    for state, row in enumerate(rows):
        table[state, list(row)] = list(row.values())
    columns, classes = np.unique(table, axis=1, return_inverse=True)
    accepts = np.array([state in accepting for state in range(len(rows))])
    return ByteDfa(classes.reshape(-1).astype(np.int32), np.ascontiguousarray(columns), accepts, (None,) * len(rows))


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
    alive = _lead_to(table, accepting)
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


def _lead_to(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """[num_states] whether a state leads to an accepting one: a search backwards from these."""
    num = len(table)
    states, columns = np.nonzero(table != DEAD)
    targets, states = np.divmod(np.unique(table[states, columns] * num + states), num)  # in the order of their targets
    first = np.searchsorted(targets, np.arange(num + 1))
    alive = accepting.copy()
    frontier = np.flatnonzero(accepting)
    while len(frontier):
        sizes = first[frontier + 1] - first[frontier]
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        before = states[np.repeat(first[frontier], sizes) + within]
        frontier = np.unique(before[~alive[before]])
        alive[frontier] = True
    return alive


def _equivalence(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[num_states] ids of states of one label that accept the same: Moore's refinement, on rows hashed with random weights.

    A block is named by its first state. Those of one state are never looked at again.
    """
    random = np.random.default_rng(0)
    num = len(table)
    weights = random.integers(1, 1 << 62, size=table.shape[1], dtype=np.uint64) | np.uint64(1)
    names = random.integers(0, 1 << 62, size=num + 1, dtype=np.uint64)
    blocks, active, num_blocks = np.zeros(num + 1, dtype=np.int64), np.arange(num), 0
    blocks[-1] = num  # of DEAD
    rows = labels.astype(np.uint64)
    while True:
        check_time()
        _, first, refined, sizes = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
        if len(first) == num_blocks:
            return np.unique(blocks[:-1], return_inverse=True)[1].reshape(-1)
        refined = refined.reshape(-1)
        blocks[active] = active[first][refined]
        active, num_blocks = active[sizes[refined] > 1], int((sizes > 1).sum())
        next_names = names[blocks[table[active]]]  # [num_active, num_classes]
        rows = (next_names * weights).sum(axis=1) + names[blocks[active]] * np.uint64(0x9E3779B97F4A7C15)


def _product(a: ByteDfa, b: ByteDfa, accept: Callable[[bool, bool], bool]) -> ByteDfa:
    """The automaton over pairs of states."""
    if any(a.counters) or any(b.counters):
        raise CounterConflict("a text of bounded length has another condition too")
    pairs, classes = np.unique(np.stack([a.classes, b.classes]), axis=1, return_inverse=True)
    table_a = np.vstack([a.table, np.full((1, a.table.shape[1]), DEAD, np.int32)])[:, pairs[0]]  # DEAD indexes the last
    table_b = np.vstack([b.table, np.full((1, b.table.shape[1]), DEAD, np.int32)])[:, pairs[1]]
    ids: dict[tuple[int, int], int] = {(0, 0): 0}
    todo, accepting = [(0, 0)], []
    rows: list[list[int]] = []
    accepts_a, accepts_b = [*a.accepting.tolist(), False], [*b.accepting.tolist(), False]
    for state_a, state_b in todo:
        if len(rows) % 64 == 0:
            check_time()
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
