"""Local references of a JSON Schema: `#`, `#/pointer` and `#anchor`. Others are refused by name."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from hf_accel.structured.syntax import StructureError

Schema = dict[str, Any] | bool


class References:
    """Looks references up in one root schema."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._anchors: dict[str, Any] = {}
        self._collect(root)

    def resolve(self, reference: object) -> Schema:
        """What a `$ref` names.

        Raises:
            StructureError: it is remote, or names nothing.
        """
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise StructureError(f"the schema has a remote $ref {reference!r}: put what it names under $defs")
        fragment = unquote(reference[1:])
        if fragment and not fragment.startswith("/"):
            if fragment not in self._anchors:
                raise StructureError(f"$ref {reference!r} names nothing in the schema")
            anchored: Schema = self._anchors[fragment]
            return anchored
        target: Any = self._root
        for part in fragment.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key)] if isinstance(target, list) else target[key]
            except (KeyError, ValueError, IndexError, TypeError):
                raise StructureError(f"$ref {reference!r} names nothing in the schema") from None
        if not isinstance(target, (dict, bool)):
            raise StructureError(f"$ref {reference!r} names something that is no schema")
        return target

    def _collect(self, node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$anchor"), str):
                self._anchors[node["$anchor"]] = node
            for child in node.values():
                self._collect(child)
        elif isinstance(node, list):
            for child in node:
                self._collect(child)
