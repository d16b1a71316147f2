"""What is certain of the values of a conjunction of schemas, without compiling it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_accel.structured.json_keywords import (
    ATOMS,
    NARROW_NOT,
    SOME_ITEM,
    SOME_PROPERTY,
    Schema,
    atom_of,
    atoms_of,
    each_nested,
    normal,
    same,
)
from hf_accel.structured.json_refs import References

_EXACT = {
    *("type", "enum", "const", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties"),
    *("properties", "required", "additionalProperties", "items", "prefixItems", "allOf", "anyOf", "$ref"),
}
"""Keywords that are compiled to an empty automaton only where they allow no value."""


class Facts:
    """Types, constants and properties of what normal schemas allow together."""

    def __init__(self) -> None:
        self.atoms = set(ATOMS)
        self.values: list[Any] | None = None
        self.required: set[str] = set()
        self.forbidden: set[str] = set()
        self.properties: dict[str, list[Schema]] = {}
        self.names: set[str] = set()  # with `closed`: all there can be
        self.closed = False

    def add(self, schema: dict[str, Any]) -> None:
        """Take in what one schema says."""
        self.atoms &= atoms_of(schema)
        for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if values is not None:
                known = self.values
                self.values = values if known is None else [v for v in known if any(same(v, w) for w in values)]
        self.required |= set(schema.get("required", []))
        for name, value in schema.get("properties", {}).items():
            self.properties.setdefault(name, []).append(value)
            if value is False:
                self.forbidden.add(name)
        if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
            names = set(schema.get("properties", {}))
            self.names = self.names & names if self.closed else names
            self.closed = True

    def allowed(self) -> list[Any]:
        """The constants of a type that is allowed."""
        return [v for v in self.values or [] if atom_of(v) in self.atoms]


def possible(facts: Facts, option: Schema) -> bool:
    """Whether an alternative may allow any value beside the facts; True where only compiling it tells."""
    option = normal(option)
    if isinstance(option, bool):
        return option
    atoms = facts.atoms & atoms_of(option)
    if atoms == {"object"}:
        forbidden = {n for n, v in option.get("properties", {}).items() if v is False}
        required = set(option.get("required", []))
        if forbidden & (facts.required | required) or required & facts.forbidden:
            return False
        if facts.closed and required - facts.names:
            return False
    return bool(atoms)


def is_odd(facts: Facts, option: Schema) -> bool:
    """Whether an alternative of NARROW_NOT gives a wrong value to something that the facts do not speak of."""
    if isinstance(option, bool):
        return False
    if any(
        isinstance(value, dict) and NARROW_NOT in value
        for key in (SOME_PROPERTY, SOME_ITEM)
        for value in option.get(key, [])
    ):
        return True
    wrong = [n for n, v in option.get("properties", {}).items() if isinstance(v, dict) and NARROW_NOT in v]
    return any(name not in facts.properties for name in wrong)


def is_exact(schemas: Sequence[Schema], references: References) -> bool:
    """Whether an empty automaton of these schemas means that no value satisfies them: nothing in them is only approached."""
    todo, seen = list(schemas), set()
    while todo:
        schema = normal(todo.pop())
        if isinstance(schema, bool):
            continue
        if not schema.keys() <= _EXACT:
            return False
        if "$ref" in schema and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            todo.append(references.resolve(schema["$ref"]))
        todo += each_nested(schema)
    return True
