"""The syntax tree that patterns and schemas are translated to: characters, sequences, alternatives, repetition.

Plain data; `automaton.py` gives it its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.structured.charset import CharSet


class StructureError(ValueError):
    """A constraint cannot be compiled; the message names the construct and says what to do."""


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


@dataclass(frozen=True, eq=False)
class Fragment:
    """A deterministic automaton as a part of others; state 0 is where it starts.

    Attributes:
        edges: of each state, (first byte, last byte, next state).
        accepting: states.
    """

    edges: tuple[tuple[tuple[int, int, int], ...], ...]
    accepting: tuple[int, ...]


@dataclass(frozen=True)
class Language:
    """The byte strings that a compiled automaton accepts."""

    fragment: Fragment


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


Node = Chars | Seq | Alt | Repeat | Language | Members

EMPTY = Seq(())
NOTHING = Alt(())


def text(value: str) -> Node:
    """Exactly this text."""
    return Seq(tuple(Chars(CharSet.of_chars(char)) for char in value))
