"""Output types of outlines (`outlines.types`: Regex, JsonSchema, Choice, CFG and the terms built of them), read without importing it.

A term is told by its class once outlines is loaded. Terms that hold a JSON Schema keep it: it is never turned into a pattern.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import EMPTY, NOTHING, Alt, Language, Node, Repeat, Seq, StructureError, text

Tree = list[Any]
"""A term as JSON: [kind, ...], of texts, patterns, schemas, sequences, alternatives and repetitions."""

_ADDS_PROPERTIES = {
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
    "if",
    "dependentSchemas",
    "dependentRequired",
    "patternProperties",
}


def is_term(source: Any) -> bool:
    """Whether this is a term of outlines."""
    dsl = sys.modules.get("outlines.types.dsl")
    return dsl is not None and isinstance(source, dsl.Term)


def read_term(term: Any) -> Tree:
    """What a term says.

    Raises:
        StructureError: it is of an unknown kind, or holds a grammar inside of another term.
    """
    kind = next((c.__name__ for c in type(term).__mro__ if c.__name__ in _READERS), None)
    if kind is None:
        raise StructureError(f"the outlines term {type(term).__name__} is not supported here")
    tree: Tree = _READERS[kind](term)
    return tree


def closed(schema: Any) -> Any:
    """A schema as outlines reads it: objects have no other properties than those declared, unless the schema says so."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict) or "allOf" in schema or ("properties" in schema and _ADDS_PROPERTIES & set(schema)):
        return schema
    names, required = schema.get("properties"), set(schema.get("required", ()))
    found = {k: v if k in ("enum", "const") else closed(v) for k, v in schema.items()}
    declares = isinstance(names, dict) and schema.get("type") == "object" and required <= set(names)
    if declares:
        found.setdefault("additionalProperties", False)
    return found


def tree_node(tree: Tree, *, counting: bool) -> Node:
    """The syntax tree of what `read_term` gave. Raises StructureError for what is not supported."""
    kind, value, *rest = tree
    if kind == "text":
        return text(value)
    if kind == "regex":
        return parse_regex(value, part=True)
    if kind == "schema":
        dfa = compile_json_schema(value, whitespace=rest[0], counting=counting)
        return NOTHING if dfa.is_empty else Language(dfa.fragment)
    if kind == "repeat":
        return Repeat(tree_node(value, counting=counting), *rest)
    parts = tuple(tree_node(part, counting=counting) for part in value)
    return (Seq(parts) if parts else EMPTY) if kind == "seq" else Alt(parts)


def whitespace_of(pattern: str | None, default: str) -> str:
    """Our pattern for a JsonSchema's.

    Raises:
        StructureError: it asks for whitespace where we never put any: it may stand after commas and colons only.
    """
    if pattern is None:
        return default
    try:
        optional = re.fullmatch(pattern, "") is not None
    except re.error as error:
        raise StructureError(f"not a regular expression: {error} in whitespace_pattern={pattern!r}") from None
    if not optional:
        raise StructureError(f"whitespace_pattern={pattern!r} must let through no whitespace, too")
    return pattern


def _schema(term: Any) -> Tree:
    return ["schema", json.dumps(closed(json.loads(term.schema))), whitespace_of(term.whitespace_pattern, " ?")]


def _choice(term: Any) -> Tree:
    return ["alt", [_item(item) for item in term.items]]


def _item(item: Any) -> Tree:
    dsl = sys.modules["outlines.types.dsl"]
    return read_term(dsl.python_types_to_terms(item))


def _refuse_grammar(term: Any) -> Tree:
    raise StructureError("a grammar cannot be part of another term")


_READERS: dict[str, Any] = {
    "String": lambda t: ["text", t.value],
    "Regex": lambda t: ["regex", f"({t.pattern})"],
    "JsonSchema": _schema,
    "Choice": _choice,
    "CFG": _refuse_grammar,
    "KleeneStar": lambda t: ["repeat", read_term(t.term), 0, None],
    "KleenePlus": lambda t: ["repeat", read_term(t.term), 1, None],
    "Optional": lambda t: ["repeat", read_term(t.term), 0, 1],
    "Alternatives": lambda t: ["alt", [read_term(part) for part in t.terms]],
    "Sequence": lambda t: ["seq", [read_term(part) for part in t.terms]],
    "QuantifyExact": lambda t: ["repeat", read_term(t.term), t.count, t.count],
    "QuantifyMinimum": lambda t: ["repeat", read_term(t.term), t.min_count, None],
    "QuantifyMaximum": lambda t: ["repeat", read_term(t.term), 0, t.max_count],
    "QuantifyBetween": lambda t: ["repeat", read_term(t.term), t.min_count, t.max_count],
}
