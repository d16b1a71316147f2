"""JSON Schemas in the form in which llguidance reads them rightly: one draft, keywords side by side, patterns as Python has them.

llguidance refuses by name what it does not implement. What it would ignore, or take for more than it says, is rewritten here or
refused: keywords that an older `$schema` hides, numbers that a float64 cannot hold, repeated keys that count twice.
"""

from __future__ import annotations

import re
from typing import Any

from hf_accel.structured.json_keywords import Schema
from hf_accel.structured.syntax import StructureError

_UNKNOWN = {
    *(
        "not",
        "if",
        "then",
        "else",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "propertyNames",
        "contains",
    ),
    *("minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties", "$recursiveRef", "$dynamicRef"),
}
_LEFT_OUT = {"$schema", "x-guidance", "default", "examples", "example", "title", "description", "$comment"}
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
_LARGEST = 1 << 53
_WHITESPACE = re.compile(r"(?:\\[nrts]|[ \n\r\t\[\]()|*+?{},0-9])*")


def schema_for_llguidance(schema: Schema, whitespace: str) -> dict[str, Any]:
    """A schema that allows no more than `schema` does, with llguidance's own options.

    Args:
        schema: of any draft.
        whitespace: pattern of what may stand after commas and colons.

    Raises:
        StructureError: it has what llguidance would not take as it is meant.
    """
    if not _WHITESPACE.fullmatch(whitespace):
        raise StructureError(f"the whitespace {whitespace!r} is not supported: use a pattern of spaces and line breaks")
    found = _schema(schema)
    options = {
        "whitespace_flexible": False,
        "item_separator": f",(?:{whitespace})",
        "key_separator": f":(?:{whitespace})",
    }
    return {"x-guidance": options, **({} if found is True else found)}


def _schema(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    if unknown := _UNKNOWN & schema.keys():
        raise StructureError(f"the JSON Schema keyword {sorted(unknown)[0]!r} is not supported")
    found = {key: _value(key, value) for key, value in schema.items() if key not in _LEFT_OUT}
    if isinstance(found.get("items"), list):  # of older drafts
        rest = found.pop("additionalItems", None)
        found["prefixItems"] = found.pop("items")
        found.update({} if rest is None else {"items": rest})
    else:
        found.pop("additionalItems", None)
    for bound in ("minimum", "maximum"):
        exclusive = "exclusive" + bound.capitalize()
        if found.get(exclusive) is False:
            del found[exclusive]
        elif found.get(exclusive) is True:
            del found[exclusive]
            found.update({exclusive: found.pop(bound)} if bound in found else {})
    if found.get("uniqueItems") is False or found.get("maxItems") in (0, 1):
        found.pop("uniqueItems", None)
    _check_properties(found)
    return found


def _check_properties(schema: dict[str, Any]) -> None:
    """llguidance counts a key that is repeated twice; JSON's readers once."""
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and least > 1:
        required = schema.get("required", [])
        if not isinstance(required, list) or len(set(map(str, required))) < least:
            raise StructureError("minProperties is supported only up to the number of required properties")
        del schema["minProperties"]


def _value(keyword: str, value: Any) -> Any:
    if keyword in (
        "const",
        "enum",
        "required",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    ):
        _check_numbers(value)
        return value
    if keyword == "$ref":
        if not isinstance(value, str) or not value.startswith("#"):
            raise StructureError(f"the schema has a remote $ref {value!r}: put what it names under $defs")
        return value
    if keyword == "pattern" and isinstance(value, str):
        return pattern_for_llguidance(value)
    if keyword in _BY_NAME and isinstance(value, dict):
        names = pattern_for_llguidance if keyword == "patternProperties" else str
        return {names(name): _schema(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_schema(one) for one in value]
    return _schema(value)


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        raise StructureError(f"the number {value} has more digits than a float64 can tell apart")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(one)


# ---- patterns ------------------------------------------------------------------------------------------------------

_PIECE = re.compile(r"\\[\s\S]|\[\^?\]?(?:\\[\s\S]|[^\]\\])*\]|[*+?}][+]|[\s\S]")
_IN_CLASS = re.compile(r"\\[\s\S]|--|[\s\S]")
_WIDER = {r"\w": r"\p{L}\p{N}_", r"\d": r"\p{Nd}", r"\s": r"\s\x{1c}-\x{1f}"}  # all that Python has, and perhaps more


def pattern_for_llguidance(pattern: str) -> str:
    """A pattern in Rust's notation that finds no more than Python's `re.search` does.

    Raises:
        StructureError: it has a construct that means something else there.
    """
    return "".join(_piece(piece, pattern) for piece in _PIECE.findall(pattern))


def _piece(piece: str, pattern: str) -> str:
    if piece in (r"\W", r"\D", r"\S"):
        return f"[^{_WIDER[piece.lower()]}]"
    if len(piece) == 2 and piece[0] in "*+?}":
        raise StructureError(f"the pattern {pattern!r} has a possessive repetition")
    if not (piece.startswith("[") and len(piece) > 1):
        return piece
    negated = piece.startswith("[^")
    inside = []
    for part in _IN_CLASS.findall(piece[1 + negated : -1]):
        if part in (r"\W", r"\D", r"\S"):
            if negated:
                raise StructureError(f"the pattern {pattern!r} has {part} in a negated class")
            part = f"[^{_WIDER[part.lower()]}]"
        elif part in _WIDER and negated:
            part = _WIDER[part]
        elif part == "--":
            raise StructureError(f"the pattern {pattern!r} has -- in a class: escape the hyphen")
        elif part in "[&~":
            part = "\\" + part
        inside.append(part)
    text = "".join(inside)
    return f"[{'^' * negated}{chr(92) if text.startswith(']') else ''}{text}]"
