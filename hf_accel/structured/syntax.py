"""The syntax tree that patterns and schemas are translated to: characters, sequences, alternatives, repetition.

Plain data; `automaton.py` gives it its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.structured.charset import CharSet


class StructureError(ValueError):
    """A constraint cannot be compiled; the message names the construct and says what to do."""


class NotRegular(StructureError):
    """No finite automaton describes the constraint (recursion)."""


class TooLarge(StructureError):
    """The automaton of the constraint passes a cap on states or sizes."""


class NothingMatches(StructureError):
    """The constraint allows no text at all."""


@dataclass(frozen=True)
class Chars:
    """One character of a set."""

    charset: CharSet


@dataclass(frozen=True)
class Seq:
    """One part after the other; no part: the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Alt:
    """Any one of the parts; no part: nothing at all matches."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """`part`, from `low` to `high` times (None: without a bound)."""

    part: Node
    low: int
    high: int | None


class CounterConflict(StructureError):
    """A counted text stands where another alternative may stand too: it must be unrolled instead."""


@dataclass(frozen=True)
class Counter:
    """What a state of a counted text knows: how many units it may have, and whether one has just ended.

    A text of many units is not unrolled: it goes round one automaton of a unit, and how often is counted beside the state.
    """

    low: int
    high: int
    home: bool


@dataclass(frozen=True, eq=False)
class Fragment:
    """A deterministic automaton as a part of others; state 0 is where it starts.

    Attributes:
        edges: of each state, (first byte, last byte, next state).
        accepting: states.
        counters: of each state inside a counted text; None elsewhere.
    """

    edges: tuple[tuple[tuple[int, int, int], ...], ...]
    accepting: tuple[int, ...]
    counters: tuple[Counter | None, ...]


@dataclass(frozen=True)
class Language:
    """The byte strings that a compiled automaton accepts."""

    fragment: Fragment


@dataclass(frozen=True)
class Counted:
    """From `low` to `high` characters of a set, counted rather than unrolled, and the byte that ends them.

    The end must be no first byte of a character.
    """

    charset: CharSet
    low: int
    high: int
    end: int


@dataclass(frozen=True)
class Member:
    """One part of a `Members`: may be left out, may come several times in a row."""

    part: Node
    optional: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Members:
    """Parts in their order with a separator between any two that are there."""

    members: tuple[Member, ...]
    separator: Node


@dataclass(frozen=True)
class Graph:
    """Ways from state 0 to any of `ends`; an edge is (state, what is read, next state)."""

    num_states: int
    edges: tuple[tuple[int, Node, int], ...]
    ends: tuple[int, ...]


Node = Chars | Seq | Alt | Repeat | Language | Counted | Members | Graph

EMPTY = Seq(())
NOTHING = Alt(())


def text(value: str) -> Node:
    """Exactly this text."""
    return Seq(tuple(Chars(CharSet.of_chars(char)) for char in value))
