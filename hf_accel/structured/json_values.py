"""What every type of JSON value is made of: separators, constants, nested values, any value at all.

Knows no keyword: the compiler of nested schemas is handed in.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.charset import ANY_CHAR
from hf_accel.structured.json_keywords import Schema
from hf_accel.structured.json_number import NUMBER
from hf_accel.structured.json_text import json_sequences
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.regex import parse_regex, parse_search
from hf_accel.structured.syntax import (
    NOTHING,
    Alt,
    Chars,
    Language,
    Member,
    Members,
    Node,
    Repeat,
    Seq,
    StructureError,
    text,
)

ANY_DEPTH = 3  # arrays and objects inside each other, of values about which a schema says nothing
Dicts = Sequence[dict[str, Any]]


class Values:
    """Parts of values.

    Args:
        compile_all: the automaton of a conjunction of nested schemas.
        whitespace: pattern of what may stand after a comma or colon.
    """

    def __init__(self, compile_all: Callable[[Sequence[Schema]], ByteDfa], whitespace: str) -> None:
        self.compile = compile_all
        self._whitespace = whitespace
        space = parse_regex(whitespace)
        self.comma, self.colon = Seq((text(","), space)), Seq((text(":"), space))

    def nested(self, schemas: Sequence[Schema]) -> Node:
        """A value that all of `schemas` allow."""
        kept = [s for s in schemas if s is not True and s != {}]
        return language(self.compile(kept)) if kept else any_value(self._whitespace, ANY_DEPTH)

    def constant(self, value: Any) -> Node:
        """One value: text as `json.dumps` writes it, ASCII or not."""
        if isinstance(value, list):
            return Seq((text("["), self._joined([self.constant(v) for v in value]), text("]")))
        if isinstance(value, dict):
            pairs = [Seq((self.constant(k), self.colon, self.constant(v))) for k, v in value.items()]
            return Seq((text("{"), self._joined(pairs), text("}")))
        if isinstance(value, float) and not math.isfinite(value):
            raise StructureError(f"{value} is no JSON value")
        spellings = {json.dumps(value), json.dumps(value, ensure_ascii=False)}
        return Alt(tuple(map(text, sorted(spellings))))

    def _joined(self, parts: Sequence[Node]) -> Node:
        return Members(tuple(Member(p) for p in parts), self.comma)


@functools.lru_cache(maxsize=64)
def any_value(whitespace: str, depth: int) -> Node:
    """Any JSON value with at most `depth` arrays or objects inside each other."""
    parts: list[Node] = [text("null"), text("true"), text("false"), NUMBER, language(strings())]
    if depth:
        inner, space = any_value(whitespace, depth - 1), parse_regex(whitespace)
        pair = Seq((language(strings()), text(":"), space, inner))
        for opening, part, closing in (("[", inner, "]"), ("{", pair, "}")):
            several = Members((Member(part, optional=True, repeated=True),), Seq((text(","), space)))
            parts.append(Seq((text(opening), several, text(closing))))
    return language(compile_node(Alt(tuple(parts))))


def language(dfa: ByteDfa) -> Node:
    """An automaton as a part of a tree."""
    return NOTHING if dfa.is_empty else Language(dfa.fragment)


def accepts(dfa: ByteDfa, value: Any) -> bool:
    """Whether a scalar is let through: numbers in their plain form."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        plain = f"{Decimal(repr(value)):f}"
        data = plain.rstrip("0").rstrip(".") if "." in plain else plain
    else:
        data = json.dumps(value)
    state, _ = dfa.walk_counted(data.encode(), 0, 0)
    return state != DEAD and bool(dfa.accepting[state])


def decoded(node: Node) -> ByteDfa:
    """Spellings inside a JSON string of the texts of a tree."""
    return compile_node(node, spell=json_sequences)


def quoted(inside: ByteDfa) -> ByteDfa:
    """JSON strings of spellings inside them."""
    return compile_node(Seq((text('"'), language(inside), text('"'))))


@functools.cache
def insides() -> ByteDfa:
    """Spellings of any text inside a JSON string."""
    return decoded(Repeat(Chars(ANY_CHAR), 0, None))


@functools.cache
def strings() -> ByteDfa:
    """Any JSON string."""
    return quoted(insides())


@functools.lru_cache(maxsize=256)
def found(pattern: str) -> ByteDfa:
    """Spellings of the texts in which a pattern is found."""
    return decoded(parse_search(pattern))


@functools.lru_cache(maxsize=256)
def not_found(pattern: str) -> ByteDfa:
    """Spellings of the texts in which a pattern is not found, however its classes are read."""
    return insides() - decoded(parse_search(pattern, wide=True))
