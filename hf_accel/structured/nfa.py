"""Nondeterministic automata over bytes: Thompson's construction from a syntax tree, and the subset construction.

An intermediate form: `automaton.compile_node` makes the automaton that is kept.
"""

from __future__ import annotations

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

DEAD = -1

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
        todo, table, accepting, counters = [first], [], [], []
        for subset in todo:
            accepting.append(end in subset)
            counters.append(self._counter(subset))
            targets: dict[int, list[int]] = {}
            for state in subset:
                for low, high, target in moves[state]:
                    for symbol in range(low, high + 1):
                        targets.setdefault(symbol, []).append(target)
            row, known = [DEAD] * num_classes, {}
            for symbol, states in targets.items():
                key = tuple(states)
                if key not in known:
                    union = frozenset().union(*(self._closure(s, end, closures) for s in key))
                    if union not in ids:
                        if len(ids) >= max_states:
                            raise TooLarge(
                                f"the constraint needs more than {max_states} states: make it simpler, or use smaller bounds"
                            )
                        ids[union] = len(ids)
                        todo.append(union)
                    known[key] = ids[union]
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
            seen, todo = {state}, [state]
            for each in todo:
                for after in self.free[each]:
                    if after not in seen:
                        seen.add(after)
                        todo.append(after)
            known[state] = frozenset(s for s in seen if self.edges[s] or s == end)
        return known[state]
