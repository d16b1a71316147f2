"""The form of JSON Schemas: which keywords say something of values, in one spelling whatever the draft, checked in shape.

Everything else (title, default, examples, $comment, contentEncoding, x-...) is an annotation and says nothing of values; one that
looks like a keyword misspelt is said to be in the log.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from hf_accel.structured.syntax import StructureError

_log = logging.getLogger(__name__)

Schema = dict[str, Any] | bool

FRACTION = "\0fraction"  # numbers that are no integers: with "integer" the two halves of "number"
ATOMS = ("null", "boolean", "integer", FRACTION, "string", "array", "object")
"""Types, none of which shares a value with another."""

# What no schema spells: made by `json_negation`.
NOT_PATTERN = "\0notPattern"
NOT_VALUES = "\0notValues"  # of strings and numbers
NOT_MULTIPLE = "\0notMultipleOf"
NARROW_NOT = "\0narrowNot"  # not, of which alternatives that nobody would write are left out
SOME_PROPERTY = "\0someProperty"  # a list of `json_objects.Some`'s fields
SOME_ITEM = "\0someItem"  # [first index, schema]

_REFUSED = {
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "unevaluatedProperties": "use additionalProperties beside all the properties",
    "unevaluatedItems": "use items beside prefixItems",
    "extends": "it is of draft 3: use allOf",
    "disallow": "it is of draft 3: use not",
    "divisibleBy": "it is of draft 3: use multipleOf",
    "nullable": 'it is OpenAPI\'s, no JSON Schema: use "type": [..., "null"]',
}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return is_number(value) and value == int(value) and value >= 0


def _is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_map_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


_is_names = _is_list_of(_is_string)
_is_schemas = _is_list_of(_is_schema)
_is_schema_map = _is_map_of(_is_schema)
_SHAPES: list[tuple[str, Callable[[Any], bool], tuple[str, ...]]] = [
    ("a type or a list of types", lambda v: _is_string(v) or _is_names(v), ("type",)),
    ("a list", lambda v: isinstance(v, list), ("enum",)),
    ("any value", lambda v: True, ("const",)),
    ("a number", is_number, ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("a number above 0", lambda v: is_number(v) and v > 0, ("multipleOf",)),
    (
        "an integer of at least 0",
        _is_count,
        (
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
            "minContains",
            "maxContains",
            "minProperties",
            "maxProperties",
        ),
    ),
    ("a string", _is_string, ("pattern", "format", "$ref")),
    ("true or false", lambda v: isinstance(v, bool), ("uniqueItems",)),
    ("a list of strings", _is_names, ("required",)),
    ("a list of schemas", _is_schemas, ("prefixItems", "allOf")),
    ("a list of at least one schema", lambda v: _is_schemas(v) and bool(v), ("anyOf", "oneOf")),
    (
        "a schema",
        _is_schema,
        ("items", "contains", "additionalProperties", "propertyNames", "not", "if", "then", "else"),
    ),
    ("an object of schemas", _is_schema_map, ("properties", "patternProperties", "dependentSchemas")),
    ("an object of lists of strings", _is_map_of(_is_names), ("dependentRequired",)),
]
_CHECKS = {keyword: (words, check) for words, check, keywords in _SHAPES for keyword in keywords}
_IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependencies")
_ANNOTATIONS = {"definitions", "additionalItems", "dependencies", "id", "$defs", "$id", "examples", "example", "title"}
_INTERNAL = (NARROW_NOT, NOT_PATTERN, NOT_VALUES, NOT_MULTIPLE, SOME_PROPERTY, SOME_ITEM)


def normal(schema: Any) -> Schema:
    """A schema with the keywords that say something of values alone, as draft 2020-12 has them; nested ones are let be.

    Raises:
        StructureError: it is no schema, a keyword has a value of another shape, or is not supported.
    """
    if not _is_schema(schema):
        raise StructureError(f"a schema must be an object, true or false, not {schema!r}")
    if isinstance(schema, bool):
        return schema
    schema = _without_unevaluated(schema)
    for keyword, remedy in _REFUSED.items():
        if keyword in schema and not (keyword == "nullable" and schema[keyword] is False):
            raise StructureError(f"the JSON Schema keyword {keyword!r} is not supported: {remedy}")
    kept = {k: v for k, v in schema.items() if k in _CHECKS or k in _INTERNAL}
    for word in schema.keys() - kept.keys():
        _say_misspelt(word)
    _rename(schema, kept)
    for keyword, value in kept.items():
        if keyword in _INTERNAL:
            continue
        words, check = _CHECKS[keyword]
        if not check(value):
            raise StructureError(f"{keyword} must be {words}, got {value!r}")
    return kept


@functools.lru_cache(maxsize=4096)
def _say_misspelt(word: str) -> None:
    """One log line for an unknown keyword that is nearly a known one."""
    near = [] if word in _ANNOTATIONS else difflib.get_close_matches(word, _CHECKS, 1, 0.85)
    if near:
        _log.warning(
            "structured output: %r is no keyword of JSON Schema, and says nothing: was %r meant?", word, near[0]
        )


def _without_unevaluated(schema: dict[str, Any]) -> dict[str, Any]:
    """Where no schema beside them evaluates anything, unevaluated properties and items are the additional ones."""
    for keyword, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if keyword in schema:
            value = schema[keyword]
            rest = {k: v for k, v in schema.items() if k != keyword}
            if value is True or plain in schema:
                schema = rest
            elif not schema.keys() & {*_IN_PLACE, *(("contains",) if plain == "items" else ())}:
                schema = {**rest, plain: value}
    return schema


def _rename(schema: dict[str, Any], kept: dict[str, Any]) -> None:
    """Spell what earlier drafts have otherwise, and drop what says nothing without a keyword that is not there."""
    if isinstance(kept.get("items"), list):
        kept["prefixItems"] = kept.pop("items")
        if "additionalItems" in schema:
            kept["items"] = schema["additionalItems"]
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(kept.get(exclusive), bool) and kept.pop(exclusive) and inclusive in kept:
            kept[exclusive] = kept.pop(inclusive)
    if isinstance(schema.get("dependencies"), dict):
        for name, value in schema["dependencies"].items():
            names = [value] if isinstance(value, str) else value
            keyword = "dependentRequired" if isinstance(names, list) else "dependentSchemas"
            kept[keyword] = {**kept.get(keyword, {}), name: names}
    if "if" not in kept or not ("then" in kept or "else" in kept):
        for keyword in ("if", "then", "else"):
            kept.pop(keyword, None)
    if "contains" not in kept:
        for keyword in ("minContains", "maxContains"):
            kept.pop(keyword, None)


def atoms_of(schema: dict[str, Any]) -> set[str]:
    """The types, of ATOMS, that the keyword `type` lets through."""
    kinds = schema.get("type")
    if kinds is None:
        return set(ATOMS)
    found: set[str] = set()
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind == "number":
            found |= {"integer", FRACTION}
        elif kind in ATOMS:
            found.add(kind)
        elif kind == "any":  # draft 3
            found |= set(ATOMS)
        else:
            raise StructureError(f"unknown type {kind!r} in the schema")
    return found


def atom_of(value: Any) -> str:
    """The type, of ATOMS, of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == value // 1 else FRACTION
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def same(first: Any, second: Any) -> bool:
    """JSON's equality: true is not 1, 1.0 is 1."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return atom_of(first) == atom_of(second) and bool(first == second)


def each_nested(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas directly inside a normal one."""
    for keyword in ("items", "contains", "additionalProperties", "propertyNames", "not", "if", "then", "else"):
        if keyword in schema:
            yield schema[keyword]
    for keyword in ("prefixItems", "allOf", "anyOf", "oneOf"):
        yield from schema.get(keyword, [])
    for keyword in ("properties", "patternProperties", "dependentSchemas"):
        yield from schema.get(keyword, {}).values()
