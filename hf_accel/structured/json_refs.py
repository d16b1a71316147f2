"""Local references of a JSON Schema: `#`, `#/pointer`, `#anchor`, and the `$id` of a schema inside. Others are refused by name."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from hf_accel.structured.json_keywords import Schema
from hf_accel.structured.syntax import StructureError

_VALUES = ("const", "enum", "default", "examples")  # what is in them is no schema


class References:
    """Looks references up in one root schema.

    Attributes:
        root: the schema, in which every reference is relative to the root's own address.
    """

    def __init__(self, root: Any) -> None:
        self._resources: dict[str, Any] = {}
        self._anchors: dict[str, Any] = {}
        self.root = self._read(root, "")
        self._resources[""] = self.root

    def resolve(self, reference: str) -> Schema:
        """What a `$ref` of the root names.

        Raises:
            StructureError: it is remote, or names nothing.
        """
        address, fragment = urldefrag(reference)
        if address not in self._resources:
            raise StructureError(f"the schema has a remote $ref {reference!r}: put what it names under $defs")
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get(f"{address}#{fragment}")
        else:
            target = _follow(self._resources[address], fragment)
            if target is None:  # an `id` that was not meant as an address
                target = _follow(self.root, fragment)
        if target is None:
            raise StructureError(f"$ref {reference!r} names nothing in the schema")
        if not isinstance(target, (dict, bool)):
            raise StructureError(f"$ref {reference!r} names something that is no schema")
        return target

    def _read(self, node: Any, base: str) -> Any:
        """A copy whose references are whole addresses, and whose addresses and anchors are known."""
        if isinstance(node, list):
            return [self._read(child, base) for child in node]
        if not isinstance(node, dict):
            return node
        own = node.get("$id", node.get("id") if "$ref" not in node else None)
        anchors = [node.get("$anchor")]
        if isinstance(own, str) and own.startswith("#"):  # an anchor, until draft 7
            anchors.append(own[1:])
        elif isinstance(own, str):
            base = urldefrag(urljoin(base, own))[0]
        copy: dict[str, Any] = {}
        for key, child in node.items():
            if key == "$ref" and isinstance(child, str):
                copy[key] = urljoin(base, child) if not child.startswith("#") else base + child
            else:
                copy[key] = child if key in _VALUES else self._read(child, base)
        if isinstance(own, str):
            self._resources.setdefault(base, copy)
        for anchor in anchors:
            if isinstance(anchor, str):
                self._anchors[f"{base}#{anchor}"] = copy
        return copy


def _follow(target: Any, pointer: str) -> Any:
    for part in unquote(pointer).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(key)] if isinstance(target, list) else target[key]
        except (KeyError, ValueError, IndexError, TypeError):
            return None
    return target
