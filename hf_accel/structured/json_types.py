"""The JSON Schema keywords of single types: numbers, strings, arrays, objects, and constants of any type.

Each takes a conjunction of plain schemas (no references, no alternatives). Knows nothing of how schemas combine: the
compiler of nested ones is handed in.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.charset import ANY_CHAR
from hf_accel.structured.json_formats import FORMATS
from hf_accel.structured.json_number import Bound, integer_dfa, number_dfa
from hf_accel.structured.json_refs import Schema
from hf_accel.structured.json_text import json_sequences
from hf_accel.structured.regex import parse_regex, parse_search
from hf_accel.structured.syntax import (
    EMPTY,
    NOTHING,
    Alt,
    Chars,
    Counted,
    Language,
    Member,
    Members,
    Node,
    Repeat,
    Seq,
    StructureError,
    text,
)

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
MAX_PATTERNS = 4
UNROLLED = 16  # characters of a string that are unrolled rather than counted
_CONTENT = ("pattern", "format")
ANY_DEPTH = 3  # of values about which a schema says nothing

_REFUSED = {
    "array": ("contains", "minContains", "maxContains", "unevaluatedItems"),
    "object": ("dependentRequired", "dependentSchemas", "propertyNames", "unevaluatedProperties"),
    "string": ("contentEncoding", "contentMediaType", "contentSchema"),
}

Dicts = Sequence[dict[str, Any]]


class TypeCompiler:
    """Syntax trees of the values of one type that a conjunction of schemas allows.

    Args:
        compile_all: the automaton of a conjunction of nested schemas.
        whitespace: pattern of what may stand after a comma or colon.
        counting: count the characters of long strings instead of unrolling them.
    """

    def __init__(self, compile_all: Callable[[Sequence[Schema]], ByteDfa], whitespace: str, counting: bool) -> None:
        self._compile = compile_all
        self._counting = counting
        space = parse_regex(whitespace)
        self._comma, self._colon = Seq((text(","), space)), Seq((text(":"), space))
        self._any_values: dict[int, Node] = {}

    def node(self, kind: str, schemas: Dicts) -> Node:
        """Values of type `kind`, one of TYPES."""
        for schema in schemas:
            for keyword in _REFUSED.get(kind, ()):
                if keyword in schema:
                    raise StructureError(f"the JSON Schema keyword {keyword!r} is not supported: express it without")
        if kind == "null":
            return text("null")
        if kind == "boolean":
            return Alt((text("true"), text("false")))
        if kind in ("integer", "number"):
            return _language(self._number(kind, schemas))
        if kind == "string":
            return _language(self._string(schemas))
        return self._array(schemas) if kind == "array" else self._object(schemas)

    def constant(self, value: Any) -> Node:
        """One value: text as `json.dumps` writes it, ASCII or not."""
        if isinstance(value, list):
            return Seq((text("["), self._joined([self.constant(v) for v in value]), text("]")))
        if isinstance(value, dict):
            pairs = [Seq((self.constant(k), self._colon, self.constant(v))) for k, v in value.items()]
            return Seq((text("{"), self._joined(pairs), text("}")))
        if isinstance(value, float) and not math.isfinite(value):
            raise StructureError(f"{value} is no JSON value")
        spellings = {json.dumps(value), json.dumps(value, ensure_ascii=False)}
        return Alt(tuple(map(text, sorted(spellings))))

    def _joined(self, parts: Sequence[Node]) -> Node:
        return Members(tuple(Member(p) for p in parts), self._comma)

    # ---- scalars -----------------------------------------------------------------------------------------------

    def _number(self, kind: str, schemas: Dicts) -> ByteDfa:
        dfas = []
        for schema in schemas or [{}]:
            low, high = _bounds(schema)
            multiple = schema.get("multipleOf")
            if multiple is not None and (isinstance(multiple, bool) or multiple != int(multiple) or multiple < 1):
                raise StructureError(f"multipleOf {multiple!r}: only positive integers are supported")
            if kind == "integer" or multiple is not None:
                dfas.append(integer_dfa(low, high, int(multiple or 1)))
            else:
                dfas.append(number_dfa(low, high))
        return reduce(ByteDfa.__and__, dfas)

    def _string(self, schemas: Dicts) -> ByteDfa:
        low = max((_count(s, "minLength", 0) for s in schemas), default=0)
        highs = [_count(s, "maxLength", 0) for s in schemas if "maxLength" in s]
        if highs and low > min(highs):
            return compile_node(NOTHING)
        if self._counting and highs and min(highs) > UNROLLED and not any(k in s for s in schemas for k in _CONTENT):
            counted = Counted(ANY_CHAR, low, min(highs), ord('"'))
            return compile_node(Seq((text('"'), _language(_decoded(counted)))))
        inside = [_decoded(Repeat(Chars(ANY_CHAR), low, min(highs, default=None)))] if low or highs else []
        for schema in schemas:
            if "pattern" in schema:
                inside.append(_decoded(parse_search(schema["pattern"])))
            if "format" in schema:
                inside.append(_decoded(parse_regex(_format(schema["format"]))))
        dfa = reduce(ByteDfa.__and__, inside) if inside else _decoded(Repeat(Chars(ANY_CHAR), 0, None))
        return compile_node(Seq((text('"'), _language(dfa), text('"'))))

    # ---- arrays ------------------------------------------------------------------------------------------------

    def _array(self, schemas: Dicts) -> Node:
        prefixes = [_prefix_items(s) for s in schemas]
        rests = [_rest_items(s) for s in schemas]
        low = max((_count(s, "minItems", 0) for s in schemas), default=0)
        highs = [_count(s, "maxItems", 0) for s in schemas if "maxItems" in s]
        high = min(highs, default=None)
        if any(s.get("uniqueItems") for s in schemas) and (high is None or high > 1):
            raise StructureError("uniqueItems is supported only with maxItems of at most 1")
        if high is not None and low > high:
            return NOTHING

        def item(index: int) -> Node:
            return self._nested([p[index] if index < len(p) else rest for p, rest in zip(prefixes, rests, strict=True)])

        num_prefix = max(map(len, prefixes), default=0)
        if high is not None:
            num_prefix = min(num_prefix, high)
        after = Repeat(
            Seq((self._comma, item(num_prefix))),
            max(low - max(num_prefix, 1), 0),
            None if high is None else max(high - max(num_prefix, 1), 0),
        )
        if num_prefix == 0:
            some = Seq((item(0), after)) if high != 0 else NOTHING
            return Seq((text("["), some if low else Alt((EMPTY, some)), text("]")))
        tail: Node = after
        for index in reversed(range(num_prefix)):
            tail = Seq((self._comma if index else EMPTY, item(index), tail))
            if index >= low:
                tail = Repeat(tail, 0, 1)
        return Seq((text("["), tail, text("]")))

    # ---- objects -----------------------------------------------------------------------------------------------

    def _object(self, schemas: Dicts) -> Node:
        required = set(itertools.chain.from_iterable(s.get("required", []) for s in schemas))
        named = dict.fromkeys(itertools.chain.from_iterable(s.get("properties", {}) for s in schemas))
        names = list(dict.fromkeys([*named, *sorted(required)]))
        members = []
        for name in names:
            value = self._nested([v for s in schemas for v in _value_schemas(s, name)])
            if value != NOTHING:
                pair = Seq((self.constant(name), self._colon, value))
                members.append(Member(pair, optional=name not in required))
            elif name in required:
                return NOTHING
        extra = self._additional(schemas, names)
        if extra is not None:
            members.append(Member(extra, optional=True, repeated=True))
        _check_counts(schemas, len(required), len(members) if extra is None else None)
        return Seq((text("{"), Members(tuple(members), self._comma), text("}")))

    def _additional(self, schemas: Dicts, names: Sequence[str]) -> Node | None:
        """Pairs whose name is none of `names`, or None where none is allowed."""
        patterns = list(dict.fromkeys(p for s in schemas for p in s.get("patternProperties", {})))
        if len(patterns) > MAX_PATTERNS:
            raise StructureError(f"at most {MAX_PATTERNS} patternProperties are supported together")
        taken = Alt(tuple(map(text, names)))
        free = _decoded(Repeat(Chars(ANY_CHAR), 0, None)) - _decoded(taken)
        found = [_decoded(parse_search(p)) for p in patterns]
        parts: list[Node] = []
        for matches in itertools.product((True, False), repeat=len(patterns)):
            own_names = free
            for matched, dfa in zip(matches, found, strict=True):
                own_names = own_names & dfa if matched else own_names - dfa
            which = {p for p, matched in zip(patterns, matches, strict=True) if matched}
            value = self._nested([v for s in schemas for v in _extra_schemas(s, which)])
            if not own_names.is_empty and value != NOTHING:
                parts.append(Seq((text('"'), _language(own_names), text('"'), self._colon, value)))
        return Alt(tuple(parts)) if parts else None

    # ---- nested ------------------------------------------------------------------------------------------------

    def _nested(self, schemas: Sequence[Schema]) -> Node:
        kept = [s for s in schemas if s is not True and s != {}]
        if not kept:
            return self._any_value(ANY_DEPTH)
        return _language(self._compile(kept))

    def _any_value(self, depth: int) -> Node:
        """Any JSON value with at most `depth` arrays or objects inside each other."""
        if depth not in self._any_values:
            parts = [self.node(kind, []) for kind in ("null", "boolean", "number", "string")]
            if depth:
                inner = self._any_value(depth - 1)
                key = self.node("string", [])
                pair = Seq((key, self._colon, inner))
                for opening, part, closing in (("[", inner, "]"), ("{", pair, "}")):
                    several = Members((Member(part, optional=True, repeated=True),), self._comma)
                    parts.append(Seq((text(opening), several, text(closing))))
            self._any_values[depth] = _language(compile_node(Alt(tuple(parts))))
        return self._any_values[depth]


def _language(dfa: ByteDfa) -> Node:
    return NOTHING if dfa.is_empty else Language(dfa.fragment)


def _decoded(node: Node) -> ByteDfa:
    """Spellings inside a JSON string of the texts of a tree."""
    return compile_node(node, spell=json_sequences)


def _count(schema: dict[str, Any], keyword: str, default: int) -> int:
    value = schema.get(keyword, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        raise StructureError(f"{keyword} must be an integer of at least 0, got {value!r}")
    return int(value)


def _format(name: str) -> str:
    if name not in FORMATS:
        raise StructureError(f"the format {name!r} is not supported; supported: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def _bounds(schema: dict[str, Any]) -> tuple[Bound | None, Bound | None]:
    """The tighter of the inclusive and exclusive bounds, on either side."""

    def limits(inclusive: str, exclusive: str) -> list[Bound]:
        for keyword in (inclusive, exclusive):
            if isinstance(schema.get(keyword, 0), bool) or not isinstance(schema.get(keyword, 0), (int, float)):
                raise StructureError(f"{keyword} must be a number, got {schema[keyword]!r}")
        found = [Bound(Decimal(repr(schema[inclusive])))] if inclusive in schema else []
        return found + ([Bound(Decimal(repr(schema[exclusive])), True)] if exclusive in schema else [])

    lows, highs = limits("minimum", "exclusiveMinimum"), limits("maximum", "exclusiveMaximum")
    low = max(lows, key=lambda b: (b.value, b.exclusive), default=None)
    high = min(highs, key=lambda b: (b.value, not b.exclusive), default=None)
    return low, high


def _prefix_items(schema: dict[str, Any]) -> list[Schema]:
    items = schema.get("items")
    return items if isinstance(items, list) else schema.get("prefixItems", [])


def _rest_items(schema: dict[str, Any]) -> Schema:
    items = schema.get("items", True)
    rest: Schema = schema.get("additionalItems", True) if isinstance(items, list) else items
    return rest


def _value_schemas(schema: dict[str, Any], name: str) -> Iterable[Schema]:
    """What one schema says of the value of a property."""
    matched = [v for p, v in schema.get("patternProperties", {}).items() if re.search(p, name)]
    own = [schema["properties"][name]] if name in schema.get("properties", {}) else []
    return own + matched or [schema.get("additionalProperties", True)]


def _extra_schemas(schema: dict[str, Any], which: set[str]) -> Iterable[Schema]:
    """What one schema says of the value of a property that it does not name, whose name these patterns match."""
    matched = [v for p, v in schema.get("patternProperties", {}).items() if p in which]
    return matched or [schema.get("additionalProperties", True)]


def _check_counts(schemas: Dicts, num_required: int, most: int | None) -> None:
    for schema in schemas:
        if _count(schema, "minProperties", 0) > num_required:
            raise StructureError("minProperties is supported only up to the number of required properties")
        if "maxProperties" in schema and (most is None or _count(schema, "maxProperties", 0) < most):
            raise StructureError("maxProperties is supported only where the schema names no more properties")
