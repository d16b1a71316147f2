"""JSON Schema as automata over bytes, keyword by keyword: implemented or refused, never ignored.

Sound: every text that is accepted parses to a value that the schema allows. Composed bottom-up from minimal automata.
Properties come in the schema's order, additional ones after them; whatever has no type and no keyword is any JSON value up
to a depth. Owns the keywords that combine schemas; `json_types.py` owns those of single types.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import reduce
from typing import Any

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.json_refs import References, Schema
from hf_accel.structured.json_types import TYPES, TypeCompiler
from hf_accel.structured.syntax import NOTHING, Alt, CounterConflict, Language, Node, NotRegular, StructureError

MAX_ALTERNATIVES = 200
REFUSED = ("not", "if", "then", "else", "$dynamicRef", "$recursiveRef", "dependencies")


def compile_json_schema(schema: Schema | str, *, whitespace: str = " ?", counting: bool = True) -> ByteDfa:
    """The texts of JSON values that a schema allows.

    Args:
        schema: a JSON Schema (draft 2020-12, also the array form of `items` of earlier ones), or its JSON text.
        whitespace: pattern of what may stand after each comma and colon; "" for compact text.
        counting: count the characters of long strings beside the states where that can be; False unrolls them.

    Raises:
        StructureError: the schema is none, uses what is not supported (the message names the keyword), or allows nothing.
    """
    root = _read(schema) if isinstance(schema, str) else schema
    try:
        dfa = SchemaCompiler(root, whitespace, counting).compile([root])
    except CounterConflict:
        dfa = SchemaCompiler(root, whitespace, counting=False).compile([root])
    if dfa.is_empty:
        raise StructureError("the schema allows no value at all: look for keywords that contradict each other")
    return dfa


def _read(text: str) -> Schema:
    try:
        schema: Schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise StructureError(f"the schema is no JSON: {error}") from None
    return schema


class SchemaCompiler:
    """Compiles conjunctions of schemas of one root; equal ones once."""

    def __init__(self, root: Schema, whitespace: str, counting: bool) -> None:
        self._references = References(root)
        self._types = TypeCompiler(self.compile, whitespace, counting)
        self._known: dict[str, ByteDfa] = {}
        self._open: list[str] = []  # references that are being compiled

    def compile(self, schemas: Sequence[Schema]) -> ByteDfa:
        """Values that all of `schemas` allow."""
        key = json.dumps(schemas)
        if key not in self._known:
            depth = len(self._open)
            try:
                self._known[key] = self._conjunction(list(schemas))
            finally:
                del self._open[depth:]
        return self._known[key]

    def node(self, schemas: Sequence[Schema]) -> Node:
        """`compile` as a part of a syntax tree."""
        dfa = self.compile(schemas)
        return NOTHING if dfa.is_empty else Language(dfa.fragment)

    def _conjunction(self, schemas: list[Schema]) -> ByteDfa:
        plain: list[dict[str, Any]] = []
        choices: list[tuple[str, list[Schema]]] = []
        todo = list(schemas)
        while todo:
            schema = todo.pop(0)
            if schema is False:
                return compile_node(NOTHING)
            if schema is True:
                continue
            if not isinstance(schema, dict):
                raise StructureError(f"a schema must be an object, true or false, not {schema!r}")
            for keyword in REFUSED:
                if keyword in schema:
                    raise StructureError(f"the JSON Schema keyword {keyword!r} is not supported: express it without")
            rest = dict(schema)
            if "$ref" in rest:
                todo.insert(0, self._enter(rest.pop("$ref")))
            todo += rest.pop("allOf", [])
            choices += [(keyword, rest.pop(keyword)) for keyword in ("anyOf", "oneOf") if keyword in rest]
            plain.append(rest)
        if choices:
            (keyword, options), *others = choices
            return self._choice(keyword, options, [*plain, *({k: o} for k, o in others)])
        return self._plain([p for p in plain if p])

    def _enter(self, reference: object) -> Schema:
        if reference in self._open:
            raise NotRegular(f"the schema is recursive ($ref {reference!r}): this needs the dynamic backend")
        self._open.append(str(reference))
        return self._references.resolve(reference)

    # ---- alternatives ------------------------------------------------------------------------------------------

    def _choice(self, keyword: str, options: list[Schema], rest: list[Schema]) -> ByteDfa:
        if not isinstance(options, list) or not 0 < len(options) <= MAX_ALTERNATIVES:
            raise StructureError(f"{keyword} must have 1 to {MAX_ALTERNATIVES} alternatives")
        compiled = [self.compile([*rest, option]) for option in options]
        if keyword == "oneOf":
            alive = [[*rest, option] for option, dfa in zip(options, compiled, strict=True) if not dfa.is_empty]
            for first, second in itertools.combinations(alive, 2):
                if not self._exclusive(first, second):
                    raise StructureError(
                        "oneOf: two alternatives may allow the same value, which cannot be ruled out here: use anyOf, or "
                        "tell them apart by a required property with different const values"
                    )
        return compile_node(Alt(tuple(Language(dfa.fragment) for dfa in compiled if not dfa.is_empty)))

    def _exclusive(self, first: Sequence[Schema], second: Sequence[Schema]) -> bool:
        """Whether certainly no value is allowed by both: by type, by constants, or by a property that both require."""
        a, b = self._facts(first), self._facts(second)
        if not _overlap(a.types, b.types):
            return True
        if a.values is not None and b.values is not None:
            return not any(_same(x, y) for x in a.values for y in b.values)
        if a.types & b.types != {"object"}:
            return False
        if (a.closed and b.required - a.names) or (b.closed and a.required - b.names):
            return True
        shared = (a.required & b.required) & set(a.properties) & set(b.properties)
        return any(self._exclusive(a.properties[name], b.properties[name]) for name in shared)

    def _facts(self, schemas: Sequence[Schema]) -> _Facts:
        facts, todo, seen = _Facts(), list(schemas), set()
        while todo:
            schema = todo.pop()
            if not isinstance(schema, dict):
                continue
            if "$ref" in schema and schema["$ref"] not in seen:
                seen.add(schema["$ref"])
                todo.append(self._references.resolve(schema["$ref"]))
            todo += schema.get("allOf", [])
            facts.add(schema)
        return facts

    # ---- one conjunction of plain schemas ----------------------------------------------------------------------

    def _plain(self, schemas: list[dict[str, Any]]) -> ByteDfa:
        values = [s for s in schemas if "const" in s or "enum" in s]
        others = [{k: v for k, v in s.items() if k not in ("const", "enum")} for s in schemas]
        facts = _Facts()
        for schema in schemas:
            facts.add(schema)
        parts: list[Node] = []
        for kind in sorted(facts.types, key=TYPES.index):
            if kind == "integer" and "number" in facts.types:
                continue
            parts.append(self._types.node(kind, others))
        dfa = compile_node(Alt(tuple(parts)))
        return reduce(ByteDfa.__and__, (self._constants(s) for s in values), dfa)

    def _constants(self, schema: dict[str, Any]) -> ByteDfa:
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            raise StructureError(f"enum must be a list, not {values!r}")
        if "const" in schema:
            values = [v for v in values if _same(v, schema["const"])]
        return compile_node(Alt(tuple(self._types.constant(v) for v in values)))


class _Facts:
    """What is certain of the values of a conjunction of schemas."""

    def __init__(self) -> None:
        self.types = set(TYPES)
        self.values: list[Any] | None = None
        self.required: set[str] = set()
        self.properties: dict[str, list[Schema]] = {}
        self.names: set[str] = set()
        self.closed = False

    def add(self, schema: dict[str, Any]) -> None:
        kinds = schema.get("type", list(TYPES))
        named = {kinds} if isinstance(kinds, str) else set(kinds)
        if unknown := named - set(TYPES):
            raise StructureError(f"unknown type {sorted(unknown)[0]!r} in the schema")
        self.types &= named | ({"integer"} if "number" in named else set())
        for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if values is not None:
                self.values = (
                    values if self.values is None else [v for v in self.values if any(_same(v, w) for w in values)]
                )
        self.required |= set(schema.get("required", []))
        for name, value in schema.get("properties", {}).items():
            self.properties.setdefault(name, []).append(value)
        if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
            names = set(schema.get("properties", {}))
            self.names = self.names & names if self.closed else names
            self.closed = True


def _overlap(first: set[str], second: set[str]) -> set[str]:
    number = {"integer", "number"}
    return (first & second) | (number if first & number and second & number else set())


def _same(first: Any, second: Any) -> bool:
    """JSON's equality: true is not 1, 1.0 is 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    return (type(first) in (int, float) and type(second) in (int, float) and first == second) or (
        type(first) is type(second) and first == second
    )
