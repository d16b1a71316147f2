"""JSON Schema as automata over bytes, keyword by keyword: implemented or refused, never ignored.

Sound: every text that is accepted parses to a value that the schema allows. Composed bottom-up from minimal automata. What
is allowed and yet not accepted, as no automaton of a sensible size has it:

* Properties come in the schema's order, then those that are only required, then additional ones.
* Whatever has no type and no keyword is any JSON value of at most three arrays and objects inside each other.
* Additional names are not told apart: `minProperties` counts them as one. Under `not`, an additional property that is wrong
  is the last one.
* Integers are plain decimals; numbers with bounds, or under `not`, have no exponent and few enough digits.
* An alternative of `oneOf` does not have what others allow, nor in general a wrong value of what it does not speak of.

Owns the keywords that combine schemas; `json_types.py` owns those of single types.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.json_facts import Facts, is_exact, is_odd, possible
from hf_accel.structured.json_keywords import NARROW_NOT, Schema, atom_of, normal, same
from hf_accel.structured.json_negation import negated
from hf_accel.structured.json_refs import References
from hf_accel.structured.json_types import TypeCompiler
from hf_accel.structured.json_values import accepts
from hf_accel.structured.syntax import (
    NOTHING,
    Alt,
    CounterConflict,
    Language,
    NothingMatches,
    NotRegular,
    StructureError,
    TooLarge,
)

MAX_ALTERNATIVES = 200
MAX_CONJUNCTIONS = 1_000


def compile_json_schema(schema: Schema | str, *, whitespace: str = " ?", counting: bool = True) -> ByteDfa:
    """The texts of JSON values that a schema allows.

    Args:
        schema: a JSON Schema (draft 2020-12, also what earlier ones spell otherwise), or its JSON text.
        whitespace: pattern of what may stand after each comma and colon; "" for compact text.
        counting: count the characters of long strings beside the states where that can be; False unrolls them.

    Raises:
        StructureError: the schema is none, uses what is not supported (the message names the keyword), or allows nothing.
        NothingMatches: it certainly allows nothing.
        NotRegular: it is recursive.
        TooLarge: it needs too many states or alternatives.
    """
    root = _read(schema) if isinstance(schema, str) else schema
    compiler = SchemaCompiler(root, whitespace, counting)
    try:
        dfa = compiler.compile_root()
    except CounterConflict:
        dfa = SchemaCompiler(root, whitespace, counting=False).compile_root()
    except RecursionError:
        raise TooLarge("the schema is nested too deeply") from None
    if dfa.is_empty:
        message = "the schema allows no value at all: look for keywords that contradict each other"
        raise NothingMatches(message) if compiler.is_exact else StructureError(f"{message} (or say it more plainly)")
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
        self._open: set[str] = set()  # keys of what is being compiled

    def compile_root(self) -> ByteDfa:
        """Values that the root allows."""
        return self.compile([self._references.root])

    @property
    def is_exact(self) -> bool:
        """Whether an empty automaton of the root means that it allows no value."""
        return is_exact([self._references.root], self._references)

    def compile(self, schemas: Sequence[Schema]) -> ByteDfa:
        """Values that all of `schemas` allow."""
        key = "\n".join(unique := {json.dumps(s): s for s in schemas})
        if key in self._open:
            raise NotRegular("the schema is recursive ($ref inside what it names): this needs the dynamic backend")
        if key not in self._known:
            self._open.add(key)
            try:
                self._known[key] = self._conjunction(list(unique.values()))
            finally:
                self._open.remove(key)
            if len(self._known) > MAX_CONJUNCTIONS:
                raise TooLarge(
                    "the schema has too many combinations of alternatives: use less of not, if, oneOf and dependencies"
                )
        return self._known[key]

    def _conjunction(self, schemas: Sequence[Schema]) -> ByteDfa:
        plain: list[dict[str, Any]] = []
        choices: list[list[Schema]] = []
        exclusive: list[list[Schema]] = []
        todo, entered = list(schemas), set[str]()
        while True:
            if not self._flatten(todo, entered, plain, choices, exclusive):
                return compile_node(NOTHING)
            plain, choices, exclusive = _unique(plain), _unique(choices), _unique(exclusive)
            facts = Facts()
            for schema in plain:
                facts.add(schema)
            open_choices = [[o for o in options if possible(facts, o)] for options in choices]
            open_choices = [[o for o in options if not is_odd(facts, o)] or options[:1] for options in open_choices]
            choices = [options for options in open_choices if len(options) > 1]
            if not all(open_choices):
                return compile_node(NOTHING)
            todo = [options[0] for options in open_choices if len(options) == 1]
            if not todo:
                break
        rest = [*plain, *({"anyOf": o} for o in choices[1:])]
        if choices:
            return self._union([*rest, *({"oneOf": o} for o in exclusive)], choices[0])
        if exclusive:
            rest = [*plain, *({"oneOf": o} for o in exclusive[1:])]
            return self._union(rest, self._one_of(plain, [o for o in exclusive[0] if possible(facts, o)]))
        return self._plain(facts, plain)

    def _flatten(
        self,
        todo: list[Schema],
        entered: set[str],
        plain: list[dict[str, Any]],
        choices: list[list[Schema]],
        exclusive: list[list[Schema]],
    ) -> bool:
        """Sort a conjunction into plain schemas and alternatives; whether any value may be left."""
        while todo:
            schema = normal(todo.pop(0))
            if isinstance(schema, bool):
                if not schema:
                    return False
                continue
            if "$ref" in schema and (reference := schema.pop("$ref")) not in entered:
                entered.add(reference)
                todo.insert(0, self._references.resolve(reference))
            todo += schema.pop("allOf", [])
            if "anyOf" in schema:
                choices.append(schema.pop("anyOf"))
            if "oneOf" in schema:
                exclusive.append(schema.pop("oneOf"))
            for word in ("not", NARROW_NOT):
                if word in schema:
                    choices.append(self._negated(schema.pop(word), word))
            if "if" in schema:
                condition, met, unmet = schema.pop("if"), schema.pop("then", True), schema.pop("else", True)
                choices.append([{"allOf": [condition, met]}, {"allOf": [{"not": condition}, unmet]}])
            for name, inner in schema.pop("dependentSchemas", {}).items():
                absent = {"properties": {name: False}}
                present = {"type": "object", "properties": {name: True}, "required": [name], "allOf": [inner]}
                choices.append([present, absent])
            if schema:
                plain.append(schema)
        return True

    # ---- alternatives ------------------------------------------------------------------------------------------

    def _negated(self, schema: Schema, word: str) -> list[Schema]:
        """Alternatives that allow what a schema does not; a reference is followed once."""
        found: list[Schema] = []
        seen: set[str] = set()
        while True:
            schema = normal(schema)
            reference = None if isinstance(schema, bool) else schema.pop("$ref", None)
            found += negated(schema, word)
            if reference is None or reference in seen:
                return found
            seen.add(reference)
            schema = self._references.resolve(reference)

    def _union(self, rest: Sequence[Schema], options: Sequence[Schema]) -> ByteDfa:
        if len(options) > MAX_ALTERNATIVES:
            raise TooLarge(f"at most {MAX_ALTERNATIVES} alternatives of anyOf and oneOf are supported: use fewer")
        compiled = [self.compile([*rest, option]) for option in options]
        alive = [dfa for dfa in compiled if not dfa.is_empty]
        return alive[0] if len(alive) == 1 else compile_node(Alt(tuple(Language(dfa.fragment) for dfa in alive)))

    def _one_of(self, rest: Sequence[Schema], options: list[Schema]) -> list[Schema]:
        """The options, each without what others allow too."""
        shared: list[list[Schema]] = [[] for _ in options]
        for (i, first), (j, second) in itertools.combinations(enumerate(options), 2):
            if not self._exclude([*rest, first], [*rest, second]):
                shared[i].append({NARROW_NOT: second})
                shared[j].append({NARROW_NOT: first})
        if not any(shared):
            return options
        try:
            for others in itertools.chain.from_iterable(shared):
                assert isinstance(others, dict)
                self._negated(others[NARROW_NOT], NARROW_NOT)
        except StructureError as error:
            raise type(error)(
                f"oneOf: two alternatives may allow the same value, and what one does not allow cannot be said: {error}; "
                "or use anyOf, or tell them apart by a required property with different const values"
            ) from None
        return [
            {"allOf": [option, *others]} if others else option for option, others in zip(options, shared, strict=True)
        ]

    def _exclude(self, first: Sequence[Schema], second: Sequence[Schema]) -> bool:
        """Whether certainly no value is allowed by both: by type, by constants, or by a property that both require."""
        a, b = self._facts(first), self._facts(second)
        if not a.atoms & b.atoms:
            return True
        if a.values is not None and b.values is not None:
            return not any(same(x, y) for x in a.values for y in b.values)
        if a.atoms & b.atoms == {"object"}:
            if (a.closed and b.required - a.names) or (b.closed and a.required - b.names):
                return True
            shared = (a.required & b.required) & set(a.properties) & set(b.properties)
            if any(self._exclude(a.properties[name], b.properties[name]) for name in shared):
                return True
        both = [*first, *second]
        return is_exact(both, self._references) and self.compile(both).is_empty

    def _facts(self, schemas: Sequence[Schema]) -> Facts:
        facts, todo, seen = Facts(), list(schemas), set()
        while todo:
            schema = normal(todo.pop())
            if isinstance(schema, bool):
                continue
            if "$ref" in schema and schema["$ref"] not in seen:
                seen.add(schema["$ref"])
                todo.append(self._references.resolve(schema["$ref"]))
            todo += schema.get("allOf", [])
            facts.add(schema)
        return facts

    # ---- one conjunction of plain schemas ----------------------------------------------------------------------

    def _plain(self, facts: Facts, schemas: list[dict[str, Any]]) -> ByteDfa:
        """Where values are named, those that every other keyword allows; else the values of each type."""
        others = [rest for s in schemas if (rest := {k: v for k, v in s.items() if k not in ("const", "enum", "type")})]
        if facts.values is None:
            return compile_node(self._types.node(facts.atoms, others))
        values = facts.allowed()
        constants = compile_node(Alt(tuple(self._types.constant(v) for v in values)))
        if not others or not values:
            return constants
        rule = compile_node(self._types.node({atom_of(v) for v in values}, others))
        if any(isinstance(v, (list, dict)) for v in values):
            return constants & rule
        return compile_node(Alt(tuple(self._types.constant(v) for v in values if accepts(rule, v))))


def _unique(items: list[Any]) -> list[Any]:
    return list({json.dumps(item): item for item in items}.values())
