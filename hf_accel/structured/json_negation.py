"""`not` as alternatives: schemas that together allow exactly the values that a schema does not.

Of values, not of texts: 1.0 is no other value than 1, nor "\\u0061" than "a". What no schema spells is said by keywords of
our own (`json_keywords`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hf_accel.structured.json_formats import is_enforced
from hf_accel.structured.json_keywords import (
    ATOMS,
    FRACTION,
    NOT_MULTIPLE,
    NOT_PATTERN,
    NOT_VALUES,
    SOME_ITEM,
    SOME_PROPERTY,
    Schema,
    atom_of,
    atoms_of,
)
from hf_accel.structured.syntax import StructureError

_OPPOSITE = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}
_COUNTS = (("Length", "string"), ("Items", "array"), ("Properties", "object"))


def negated(schema: Schema, word: str = "not") -> list[Schema]:
    """Alternatives that allow what a normal schema without $ref does not; `word` is the keyword of nested negations.

    Raises:
        StructureError: this cannot be said (formats, uniqueItems).
    """
    if isinstance(schema, bool):
        return [] if schema else [True]
    return [
        *_types(schema, word),
        *_scalars(schema),
        *_counts(schema),
        *_items(schema, word),
        *_properties(schema, word),
        *_logic(schema, word),
    ]


def constant_schema(value: Any) -> Schema:
    """The schema of an array or object that is equal to `value`, without const."""
    if isinstance(value, list):
        each: list[Schema] = [{"const": v} for v in value]
        return {"type": "array", "prefixItems": each, "minItems": len(value), "maxItems": len(value)}
    pairs: dict[str, Schema] = {k: {"const": v} for k, v in value.items()}
    return {"type": "object", "properties": pairs, "required": list(value), "additionalProperties": False}


def _types(schema: dict[str, Any], word: str) -> Iterator[Schema]:
    if "type" in schema:
        others = [atom for atom in ATOMS if atom not in atoms_of(schema)]
        if others:
            yield {"type": others}
    for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
        if values is not None:
            yield from _others(values, word)


def _others(values: list[Any], word: str) -> Iterator[Schema]:
    """What is equal to none of the values."""
    found: dict[str, list[Any]] = {}
    for value in values:
        found.setdefault(atom_of(value), []).append(value)
    yield {"type": [atom for atom in ATOMS if atom not in found]}
    for atom, here in found.items():
        if atom == "boolean" and len({*here}) == 1:
            yield {"enum": [not here[0]]}
        elif atom in ("string", "integer", FRACTION):
            yield {"type": [atom], NOT_VALUES: here}
        elif atom in ("array", "object"):
            yield {"type": [atom], "allOf": [{word: constant_schema(v)} for v in here]}


def _scalars(schema: dict[str, Any]) -> Iterator[Schema]:
    for keyword, opposite in _OPPOSITE.items():
        if keyword in schema:
            yield {"type": "number", opposite: schema[keyword]}
    if "multipleOf" in schema:
        yield {"type": "number", NOT_MULTIPLE: schema["multipleOf"]}
    if "pattern" in schema:
        yield {"type": "string", NOT_PATTERN: schema["pattern"]}
    if "format" in schema and is_enforced(schema["format"]):
        raise StructureError(f"the format {schema['format']!r} is not supported under not, if or oneOf: use a pattern")


def _counts(schema: dict[str, Any]) -> Iterator[Schema]:
    for what, kind in _COUNTS:
        if schema.get(f"min{what}", 0) > 0:
            yield {"type": kind, f"max{what}": schema[f"min{what}"] - 1}
        if f"max{what}" in schema:
            yield {"type": kind, f"min{what}": schema[f"max{what}"] + 1}


def _items(schema: dict[str, Any], word: str) -> Iterator[Schema]:
    prefix = schema.get("prefixItems", [])
    for index, item in enumerate(prefix):
        yield {"type": "array", "minItems": index + 1, "prefixItems": [True] * index + [{word: item}]}
    if schema.get("items", True) not in (True, {}):
        yield {"type": "array", SOME_ITEM: [len(prefix), {word: schema["items"]}]}
    if "contains" in schema:
        low, one = schema.get("minContains", 1), {"type": "array", "contains": schema["contains"]}
        if low > 0:
            yield {**one, "minContains": 0, "maxContains": low - 1}
        if "maxContains" in schema:
            yield {**one, "minContains": schema["maxContains"] + 1}
    if schema.get("uniqueItems"):
        raise StructureError("uniqueItems is not supported under not, if or oneOf: express it without")


def _properties(schema: dict[str, Any], word: str) -> Iterator[Schema]:
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name in schema.get("required", []):
        yield {"type": "object", "properties": {name: False}}
    for name, value in properties.items():
        yield {"type": "object", "required": [name], "properties": {name: {word: value}}}
    for pattern, value in patterns.items():
        yield {"type": "object", SOME_PROPERTY: [[], [], pattern, True, {word: value}]}
    if schema.get("additionalProperties", True) not in (True, {}):
        value = {word: schema["additionalProperties"]}
        yield {"type": "object", SOME_PROPERTY: [list(properties), list(patterns), None, True, value]}
    if "propertyNames" in schema:
        if (names := _forbidden_names(schema["propertyNames"])) is not None:
            yield from ({"type": "object", "required": [name]} for name in names)
        else:
            yield {"type": "object", SOME_PROPERTY: [[], [], None, {word: schema["propertyNames"]}, True]}
    for name, others in schema.get("dependentRequired", {}).items():
        for other in others:
            yield {"type": "object", "required": [name], "properties": {other: False}}
    for name, inner in schema.get("dependentSchemas", {}).items():
        yield {"type": "object", "required": [name], word: inner}


def _forbidden_names(rule: Schema) -> list[str] | None:
    """The names that `propertyNames` does not let through, where it names them."""
    inner = rule.get("not") if isinstance(rule, dict) and len(rule) == 1 else None
    if not isinstance(inner, dict) or len(inner) != 1 or not inner.keys() <= {"enum", "const"}:
        return None
    values = inner["enum"] if "enum" in inner else [inner["const"]]
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else None


def _logic(schema: dict[str, Any], word: str) -> Iterator[Schema]:
    yield from ({word: part} for part in schema.get("allOf", []))
    if "anyOf" in schema:
        yield {"allOf": [{word: option} for option in schema["anyOf"]]}
    if "oneOf" in schema:
        yield {"allOf": [{word: option} for option in schema["oneOf"]]}
        yield from ({"allOf": list(pair)} for pair in itertools.combinations(schema["oneOf"], 2))
    if "not" in schema:
        yield schema["not"]
    if "if" in schema:
        yield {"allOf": [schema["if"], {word: schema.get("then", True)}]}
        yield {"allOf": [{word: schema["if"]}, {word: schema.get("else", True)}]}
