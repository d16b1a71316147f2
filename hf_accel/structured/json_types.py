"""The JSON Schema keywords of single types, for a conjunction of normal schemas without references or alternatives.

Numbers and strings here; `json_arrays` and `json_objects` have theirs. Knows nothing of how schemas combine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.charset import ANY_CHAR
from hf_accel.structured.json_arrays import ArrayCompiler
from hf_accel.structured.json_formats import format_pattern, integer_range
from hf_accel.structured.json_keywords import FRACTION, NOT_MULTIPLE, NOT_PATTERN, NOT_VALUES, Schema, atom_of
from hf_accel.structured.json_multiples import multiples_dfa, no_multiples_dfa
from hf_accel.structured.json_number import Bound, fractions_dfa, integer_dfa, number_dfa
from hf_accel.structured.json_objects import ObjectCompiler
from hf_accel.structured.json_values import Dicts, Values, decoded, found, insides, language, not_found, quoted, strings
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import NOTHING, Alt, Chars, Counted, Node, Repeat, Seq, text

UNROLLED = 16  # characters of a string that are unrolled rather than counted
_CONTENT = ("pattern", "format", NOT_PATTERN, NOT_VALUES)


class TypeCompiler:
    """Syntax trees of the values of one type that a conjunction of schemas allows.

    Args:
        compile_all: the automaton of a conjunction of nested schemas.
        whitespace: pattern of what may stand after a comma or colon.
        counting: count the characters of long strings instead of unrolling them.
    """

    def __init__(self, compile_all: Callable[[Sequence[Schema]], ByteDfa], whitespace: str, counting: bool) -> None:
        self._values = Values(compile_all, whitespace)
        self._counting = counting
        self.constant = self._values.constant

    def node(self, atoms: set[str], schemas: Dicts) -> Node:
        """Values of some types of ATOMS."""
        parts: list[Node] = []
        if "null" in atoms:
            parts.append(text("null"))
        if "boolean" in atoms:
            parts += [text("true"), text("false")]
        if numbers := atoms & {"integer", FRACTION}:
            parts.append(language(_number(numbers, schemas)))
        if "string" in atoms:
            parts.append(language(self._string(schemas)))
        if "array" in atoms:
            parts.append(ArrayCompiler(self._values, schemas).node())
        if "object" in atoms:
            parts.append(ObjectCompiler(self._values, schemas).node())
        return parts[0] if len(parts) == 1 else Alt(tuple(parts))

    def _string(self, schemas: Dicts) -> ByteDfa:
        low = max((int(s["minLength"]) for s in schemas if "minLength" in s), default=0)
        high = min((int(s["maxLength"]) for s in schemas if "maxLength" in s), default=None)
        if high is not None and low > high:
            return compile_node(NOTHING)
        inside = [dfa for s in schemas for dfa in _contents(s)]
        if self._counting and high is not None and high > UNROLLED and not inside:
            counted = Counted(ANY_CHAR, low, high, ord('"'))
            return compile_node(Seq((text('"'), language(decoded(counted)))))
        if low or high is not None:
            inside.append(decoded(Repeat(Chars(ANY_CHAR), low, high)))
        return quoted(reduce(ByteDfa.__and__, inside)) if inside else strings()


def _contents(schema: dict[str, Any]) -> list[ByteDfa]:
    """The conditions on the characters of a string, as spellings inside it."""
    dfas = []
    if "pattern" in schema:
        dfas.append(found(schema["pattern"]))
    if (pattern := format_pattern(schema.get("format"))) is not None:
        dfas.append(decoded(parse_regex(pattern)))
    if NOT_PATTERN in schema:
        dfas.append(not_found(schema[NOT_PATTERN]))
    if values := [v for v in schema.get(NOT_VALUES, []) if isinstance(v, str)]:
        dfas.append(insides() - decoded(Alt(tuple(map(text, values)))))
    return dfas


def _number(atoms: set[str], schemas: Dicts) -> ByteDfa:
    dfas = [] if FRACTION in atoms else [integer_dfa(None, None)]
    if "integer" not in atoms:
        dfas.append(fractions_dfa())
    for schema in schemas:
        low, high = _bounds(schema)
        if low is not None or high is not None:
            dfas.append(integer_dfa(low, high) if FRACTION not in atoms else number_dfa(low, high))
        if (limits := integer_range(schema.get("format"))) is not None:
            dfas.append(integer_dfa(*(Bound(Decimal(limit)) for limit in limits)))
        if "multipleOf" in schema:
            dfas.append(multiples_dfa(schema["multipleOf"]))
        if NOT_MULTIPLE in schema:
            dfas.append(no_multiples_dfa(schema[NOT_MULTIPLE], integers=FRACTION not in atoms))
        for value in schema.get(NOT_VALUES, []):
            if atom_of(value) in atoms:
                bound = Bound(Decimal(repr(value)), exclusive=True)
                range_dfa = integer_dfa if FRACTION not in atoms else number_dfa
                dfas.append(range_dfa(None, bound) | range_dfa(bound, None))
    return reduce(ByteDfa.__and__, dfas) if dfas else number_dfa(None, None)


def _bounds(schema: dict[str, Any]) -> tuple[Bound | None, Bound | None]:
    """The tighter of the inclusive and exclusive bounds, on either side."""

    def limits(inclusive: str, exclusive: str) -> list[Bound]:
        both = ((inclusive, False), (exclusive, True))
        return [Bound(Decimal(repr(schema[keyword])), strict) for keyword, strict in both if keyword in schema]

    lows, highs = limits("minimum", "exclusiveMinimum"), limits("maximum", "exclusiveMaximum")
    low = max(lows, key=lambda b: (b.value, b.exclusive), default=None)
    high = min(highs, key=lambda b: (b.value, not b.exclusive), default=None)
    return low, high
