"""Whether a recursive JSON Schema allows a finite value at all: `{"required": ["next"]}` with `next` the schema itself does not."""

from __future__ import annotations

from typing import Any

from hf_accel.structured.json_keywords import Schema
from hf_accel.structured.json_refs import References
from hf_accel.structured.syntax import StructureError

_NESTING = {"array", "object"}


def is_endless(root: Schema) -> bool:
    """Whether every value that the schema allows would hold another one without end. Says so only when that is certain."""
    return not _Ends(root).found()


class _Ends:
    """Which schemas have a finite value: a least fixed point over the references."""

    def __init__(self, root: Schema) -> None:
        self._root, self._references = root, References(root)
        self._ends: dict[str, bool] = {}

    def found(self) -> bool:
        before: dict[str, bool] | None = None
        while before != self._ends:
            before = dict(self._ends)
            if self._of(self._root):
                return True
            for reference in before:
                self._ends[reference] = self._ends[reference] or self._of(self._named(reference))
        return False

    def _named(self, reference: str) -> Schema:
        try:
            return self._references.resolve(reference)
        except StructureError:
            return True  # others refuse it

    def _of(self, schema: Any) -> bool:
        """Whether a value ends, as far as is known of the references by now."""
        if not isinstance(schema, dict):
            return True
        if isinstance(reference := schema.get("$ref"), str) and not self._ends.setdefault(reference, False):
            return False
        if "const" in schema or "enum" in schema:
            return True
        if not all(map(self._of, _list(schema, "allOf"))):
            return False
        for keyword in ("anyOf", "oneOf"):
            options = _list(schema, keyword)
            if options and not any(map(self._of, options)):
                return False
        kinds = schema.get("type", "any")
        named = {kinds} if isinstance(kinds, str) else set(map(str, kinds)) if isinstance(kinds, list) else {"any"}
        return bool(named - _NESTING) or self._nested(schema, named)

    def _nested(self, schema: dict[str, Any], kinds: set[str]) -> bool:
        return ("array" in kinds and self._array(schema)) or ("object" in kinds and self._object(schema))

    def _array(self, schema: dict[str, Any]) -> bool:
        least, items = schema.get("minItems", 0), schema.get("items", True)
        prefix = _list(schema, "prefixItems") or (items if isinstance(items, list) else [])
        rest = schema.get("additionalItems", True) if isinstance(items, list) else items
        if not isinstance(least, int):
            return True
        return all(map(self._of, [*prefix[:least], *([rest] if least > len(prefix) else [])]))

    def _object(self, schema: dict[str, Any]) -> bool:
        properties = schema.get("properties")
        required = [name for name in _list(schema, "required") if isinstance(name, str)]
        return not isinstance(properties, dict) or all(self._of(properties.get(name, True)) for name in required)


def _list(schema: dict[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []
