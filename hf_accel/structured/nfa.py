"""Nondeterministic automata over bytes: Thompson's construction from a syntax tree, and the subset construction.

An intermediate form: `automaton.compile_node` makes the automaton that is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from hf_accel.structured.charset import ByteRange, CharSet
from hf_accel.structured.syntax import (
    Alt,
    Chars,
    Counted,
    Counter,
    CounterConflict,
    Fragment,
    Graph,
    Language,
    Members,
    Node,
    Repeat,
    Seq,
    TooLarge,
)
from hf_accel.structured.texts import shared_texts
from hf_accel.structured.time_limit import check_time

DEAD = -1
MANY_TEXTS = 8  # alternatives from which on they share their states

Subsets = tuple[np.ndarray, np.ndarray, np.ndarray, list[Counter | None]]


class Nfa:
    """States with edges over byte ranges and free moves.

    Args:
        fragment_of: how a set of characters is spelled.
        max_states: more raise TooLarge.
    """

    def __init__(self, fragment_of: Callable[[CharSet], Fragment], max_states: int) -> None:
        self._fragment_of = fragment_of
        self._max_states = max_states
        self.edges: list[list[tuple[int, int, int]]] = []  # (first byte, last byte, next state)
        self.free: list[list[int]] = []
        self.counters: list[Counter | None] = []

    def state(self) -> int:
        """A new state."""
        if len(self.edges) >= self._max_states:
            raise self._too_large()
        self.edges.append([])
        self.free.append([])
        self.counters.append(None)
        return len(self.edges) - 1

    def _too_large(self) -> TooLarge:
        return TooLarge("the constraint unrolls to too many states: use smaller bounds on repetitions and lengths")

    def add(self, node: Node) -> tuple[int, int]:
        """Add a tree; returns where it starts and where it ends."""
        if isinstance(node, Chars):
            return self.add_fragment(self._fragment_of(node.charset))
        if isinstance(node, Language):
            return self.add_fragment(node.fragment)
        if isinstance(node, Counted):
            return self._add_counted(node)
        if isinstance(node, Seq):
            return self._add_seq(node.parts)
        if isinstance(node, Alt):
            if len(node.parts) >= MANY_TEXTS and (texts := self._texts(node)) is not None:
                return self._add_texts(texts)
            start, end = self.state(), self.state()
            for part in node.parts:
                first, last = self.add(part)
                self.free[start].append(first)
                self.free[last].append(end)
            return start, end
        if isinstance(node, Members):
            return self._add_members(node)
        if isinstance(node, Graph):
            return self._add_graph(node)
        return self._add_repeat(node)

    def check_size(self, node: Node) -> None:
        """Raise TooLarge for a tree that has too many states, before any is added."""
        if self._size(node) > self._max_states:
            raise self._too_large()

    def _size(self, node: Node) -> int:
        """States that a tree needs, at least."""
        if isinstance(node, Repeat):
            return self._size(node.part) * max(node.low, node.high or 0, 1)
        if isinstance(node, Language):
            return len(node.fragment.edges)
        if isinstance(node, Seq | Alt):
            return 1 + sum(map(self._size, node.parts))
        return 1

    def _texts(self, node: Node) -> list[bytes] | None:
        """All that a tree of single texts and alternatives of these matches; None for other trees."""
        if isinstance(node, Alt):
            parts = [self._texts(part) for part in node.parts]
            return None if None in parts else [data for part in parts for data in part or ()]
        if isinstance(node, Chars) and len(node.charset) == 1:
            data = self._only_text(self._fragment_of(node.charset))
            return None if data is None else [data]
        if isinstance(node, Seq):
            made = b""
            for part in node.parts:
                texts = self._texts(part)
                if texts is None or len(texts) != 1:
                    return None
                made += texts[0]
            return [made]
        return None

    @staticmethod
    def _only_text(fragment: Fragment) -> bytes | None:
        """The one byte string that a fragment accepts; None if it accepts others."""
        made, state = b"", 0
        while state not in fragment.accepting:
            if len(fragment.edges[state]) != 1:
                return None
            low, high, state = fragment.edges[state][0]
            if low != high or len(made) > len(fragment.edges):
                return None
            made += bytes([low])
        return None if fragment.edges[state] else made

    def _add_texts(self, texts: list[bytes]) -> tuple[int, int]:
        rows, accepting = shared_texts(texts, self._max_states)
        edges = tuple(tuple((byte, byte, target) for byte, target in row.items()) for row in rows)
        return self.add_fragment(Fragment(edges, tuple(accepting), (None,) * len(rows)))

    def _add_members(self, node: Members) -> tuple[int, int]:
        """A state for "nothing so far" and one for "something so far" after each member; every part is added once."""
        nothing, something = self.state(), self.state()
        start = nothing
        for member in node.members:
            first, last = self.add(member.part)
            after_nothing, after_something = self.state(), self.state()
            self.free[nothing].append(first)
            self._add_separator(node.separator, something, first)
            self.free[last].append(after_something)
            if member.optional:
                self.free[nothing].append(after_nothing)
                self.free[something].append(after_something)
            if member.repeated:
                self._add_separator(node.separator, last, first)
            nothing, something = after_nothing, after_something
        end = self.state()
        self.free[nothing].append(end)
        self.free[something].append(end)
        return start, end

    def _add_graph(self, node: Graph) -> tuple[int, int]:
        states = [self.state() for _ in range(node.num_states)]
        for before, part, after in node.edges:
            first, last = self.add(part)
            self.free[states[before]].append(first)
            self.free[last].append(states[after])
        end = self.state()
        for state in node.ends:
            self.free[states[state]].append(end)
        return states[0], end

    def _add_separator(self, separator: Node, before: int, after: int) -> None:
        first, last = self.add(separator)
        self.free[before].append(first)
        self.free[last].append(after)

    def _add_seq(self, parts: Iterable[Node]) -> tuple[int, int]:
        start = end = self.state()
        for part in parts:
            first, last = self.add(part)
            self.free[end].append(first)
            end = last
        return start, end

    def _add_repeat(self, node: Repeat) -> tuple[int, int]:
        if max(node.low, node.high or 0) > self._max_states:
            raise self._too_large()
        start, end = self._add_seq([node.part] * node.low)
        if node.high is None:
            first, last = self.add(node.part)
            loop = self.state()
            self.free[end].append(loop)
            self.free[loop].append(first)
            self.free[last].append(loop)
            return start, loop
        final = self.state()
        for _ in range(node.high - node.low):
            first, last = self.add(node.part)
            self.free[end] += [final, first]
            end = last
        self.free[end].append(final)
        return start, final

    def _add_counted(self, node: Counted) -> tuple[int, int]:
        """The automaton of one character, whose ends are its start, with the way out there."""
        first = len(self.edges)
        unit = self._fragment_of(node.charset)
        ends = set(unit.accepting)
        for state, edges in enumerate(unit.edges):
            self.edges[self.state()] = [(low, high, first + (0 if t in ends else t)) for low, high, t in edges]
            self.counters[first + state] = Counter(node.low, node.high, home=state == 0)
        end = self.state()
        self.edges[first].append((node.end, node.end, end))
        return first, end

    def add_fragment(self, fragment: Fragment) -> tuple[int, int]:
        """Add a copy of a deterministic automaton."""
        first = len(self.edges)
        for edges, counter in zip(fragment.edges, fragment.counters, strict=True):
            state = self.state()
            self.edges[state] = [(low, high, first + target) for low, high, target in edges]
            self.counters[state] = counter
        end = self.state()
        for state in fragment.accepting:
            self.free[first + state].append(end)
        return first, end

    def add_sequences(self, sequences: Iterable[tuple[ByteRange, ...]]) -> tuple[int, int]:
        """Add byte sequences as alternatives."""
        start, end = self.state(), self.state()
        tails: dict[tuple[ByteRange, ...], int] = {(): end}  # equal endings share their states
        for sequence in sequences:
            for cut in range(len(sequence) - 1, 0, -1):
                if sequence[cut:] not in tails:
                    tails[sequence[cut:]] = state = self.state()
                    self.edges[state].append((*sequence[cut], tails[sequence[cut + 1 :]]))
            self.edges[start].append((*sequence[0], tails[sequence[1:]]))
        return start, end

    # ---- subset construction -----------------------------------------------------------------------------------

    def determinize(self, start: int, end: int, max_states: int) -> Subsets:
        """(classes [256], table [num_states, num_classes], accepting [num_states], counters) of the same language.

        Raises:
            TooLarge: more than `max_states` states.
            CounterConflict: a state would be inside a counted text and elsewhere at once.
        """
        classes, num_classes = self._byte_classes()
        moves = [[(classes[low], classes[high], target) for low, high, target in edges] for edges in self.edges]
        closures: dict[int, frozenset[int]] = {}
        first = self._closure(start, end, closures)
        ids: dict[frozenset[int], int] = {first: 0}
        todo, accepting, counters = [first], [], []
        table: list[list[int]] = []

        def id_of(targets: tuple[int, ...]) -> int:
            closed = [self._closure(t, end, closures) for t in targets]
            union = closed[0] if len(closed) == 1 else frozenset().union(*closed)
            if union not in ids:
                if len(ids) >= max_states:
                    raise TooLarge(
                        f"the constraint needs more than {max_states} states: make it simpler, or use smaller bounds"
                    )
                ids[union] = len(ids)
                todo.append(union)
            return ids[union]

        for subset in todo:
            if len(table) % 64 == 0:
                check_time()
            accepting.append(end in subset)
            counters.append(self._counter(subset))
            row, known = [DEAD] * num_classes, {}
            moving = [moves[state] for state in subset if moves[state]]
            if len(moving) == 1 and disjoint(moving[0]):
                for low, high, target in moving[0]:
                    row[low : high + 1] = [id_of((target,))] * (high + 1 - low)
            else:
                targets: dict[int, list[int]] = {}
                for edges in moving:
                    for low, high, target in edges:
                        for symbol in range(low, high + 1):
                            targets.setdefault(symbol, []).append(target)
                for symbol, states in targets.items():
                    key = tuple(states)
                    if key not in known:
                        known[key] = id_of(key)
                    row[symbol] = known[key]
            table.append(row)
        return np.array(classes), np.array(table, dtype=np.int64), np.array(accepting, dtype=bool), counters

    def _counter(self, subset: frozenset[int]) -> Counter | None:
        found = {self.counters[state] for state in subset}
        if len(found) > 1:
            raise CounterConflict("a text of bounded length stands where another alternative may stand too")
        return next(iter(found), None)

    def _byte_classes(self) -> tuple[list[int], int]:
        """Bytes that no edge tells apart are one class; classes are in the order of their bytes."""
        cuts = sorted(
            {0, *(low for e in self.edges for low, _, _ in e), *(high + 1 for e in self.edges for _, high, _ in e)}
        )
        classes = np.searchsorted(cuts, np.arange(256), side="right") - 1
        return classes.tolist(), int(classes[-1]) + 1

    def _closure(self, state: int, end: int, known: dict[int, frozenset[int]]) -> frozenset[int]:
        """States with edges, and the end, that free moves lead to."""
        if state not in known:
            check_time()
            seen, todo = {state}, [state]
            for each in todo:
                for after in self.free[each]:
                    if after not in seen:
                        seen.add(after)
                        todo.append(after)
            known[state] = frozenset(s for s in seen if self.edges[s] or s == end)
        return known[state]


def disjoint(edges: list[tuple[int, int, int]]) -> bool:
    """Whether edges (first symbol, last symbol, target) share no symbol."""
    ordered = sorted(edges)
    return all(before[1] < after[0] for before, after in itertools.pairwise(ordered))
