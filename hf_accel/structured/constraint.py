"""What a user may ask of an output, as one kind of object: a pattern, a JSON Schema, a choice, any JSON object, or a grammar.

Owns the reading of the forms in which people give these (dicts, JSON text, pydantic models, dataclasses, typed dicts, terms of
outlines). Compiles to byte automata what is regular; knows no vocabulary.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_accel.structured.automaton import ByteDfa, compile_node, compile_texts
from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import NothingMatches, NotRegular, StructureError
from hf_accel.structured.terms import is_term, read_term, tree_node

WHITESPACE = " ?"


@dataclass(frozen=True)
class Constraint:
    """A set of texts.

    Attributes:
        kind: "regex", "json_schema", "choice", "grammar" or "term".
        value: the pattern, the schema's JSON text, the JSON list of choices, the grammar, or a term of outlines as JSON.
        whitespace: for schemas, pattern of what may stand after commas and colons.
    """

    kind: str
    value: str
    whitespace: str = WHITESPACE

    @classmethod
    def of(cls, source: Any) -> Constraint:
        """A constraint from whatever says by itself what it is.

        Args:
            source: a Constraint, an output type of outlines (`Regex`, `JsonSchema`, `Choice`, `CFG` or a term built of such), a
                JSON Schema as a dict, or a type whose values as JSON are meant (pydantic model, dataclass, TypedDict, ...).

        Raises:
            StructureError: it is none of these, or could be several: a text may be a pattern, a schema or a grammar.
        """
        if isinstance(source, Constraint):
            return source
        if is_term(source):
            return cls._of_term(source)
        if isinstance(source, (str, bytes, list, tuple, set)):
            raise StructureError(
                f"{source!r} could mean several things: say which by Constraint.regex, .json_schema, .choice or .grammar"
            )
        return cls.json_schema(source)

    @classmethod
    def _of_term(cls, term: Any) -> Constraint:
        kind = type(term).__name__
        if kind == "CFG":
            return cls.grammar(term.definition)
        if kind == "Regex":
            return cls.regex(term.pattern)
        tree = read_term(term)
        if tree[0] == "schema":
            return cls("json_schema", tree[1], tree[2])
        if tree[0] == "text":
            return cls.choice([tree[1]])
        return cls("term", json.dumps(tree))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Texts that `re.fullmatch(pattern, text)` matches."""
        if is_term(pattern):
            return cls.of(pattern)
        if not isinstance(pattern, str):
            raise StructureError(f"a pattern must be a string, not {type(pattern).__name__}")
        return cls("regex", pattern)

    @classmethod
    def json_schema(cls, schema: Any, whitespace: str = WHITESPACE) -> Constraint:
        """JSON texts that a schema allows: a dict, JSON text, pydantic model, dataclass, TypedDict, or a type of values."""
        if is_term(schema):
            return cls.of(schema)
        return cls("json_schema", json.dumps(schema_of(schema)), whitespace)

    @classmethod
    def json_object(cls, whitespace: str = WHITESPACE) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, whitespace)

    @classmethod
    def choice(cls, choices: Sequence[str] | type[enum.Enum]) -> Constraint:
        """One of some texts."""
        if is_term(choices):
            return cls.of(choices)
        values = [m.value for m in choices] if isinstance(choices, type) else list(choices)
        if isinstance(choices, str) or not values or not all(isinstance(v, str) for v in values):
            raise StructureError("a choice needs a list of at least one string")
        return cls("choice", json.dumps(values))

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """Texts of a context-free grammar, in one of two notations.

        * Lark, as llguidance reads it: the rule `start`, terminals in capitals, `%ignore`, `%import common.X`, `/regex/`.
        * GBNF, as llama.cpp has it (an EBNF with `::=`): the rule `root` (or `start`), "literals", [classes], `* + ? {m,n}`.
        """
        if is_term(text):
            return cls.of(text)
        if not isinstance(text, str) or not text.strip():
            raise StructureError("a grammar must be a text in Lark's notation or in GBNF")
        return cls("grammar", text)

    @property
    def digest(self) -> str:
        """Equal for constraints that allow the same texts for the same reason."""
        return hashlib.sha256(json.dumps([self.kind, self.value, self.whitespace]).encode()).hexdigest()

    def compile(self, *, counting: bool = True) -> ByteDfa:
        """The automaton.

        Args:
            counting: count the characters of long texts beside the states; False unrolls them.

        Raises:
            StructureError: it is not supported, too large, or allows nothing.
        """
        dfa = _compiled(self, counting)
        if dfa.is_empty:
            raise NothingMatches(f"the {self.kind} {self.value!r} matches no text at all")
        return dfa


@functools.lru_cache(maxsize=256)
def _compiled(constraint: Constraint, counting: bool) -> ByteDfa:
    if constraint.kind == "grammar":
        raise NotRegular("a grammar is not regular: it needs the dynamic backend")
    if constraint.kind == "term":
        return compile_node(tree_node(json.loads(constraint.value), counting=counting))
    if constraint.kind == "regex":
        return compile_node(parse_regex(constraint.value))
    if constraint.kind == "choice":
        try:
            return compile_texts([choice.encode() for choice in json.loads(constraint.value)])
        except UnicodeEncodeError as error:
            raise StructureError(f"a choice is no text: {error}") from None
    return compile_json_schema(constraint.value, whitespace=constraint.whitespace, counting=counting)


def schema_of(source: Any) -> Any:
    """The JSON Schema of what a user gave; see `Constraint.json_schema`.

    Raises:
        StructureError: nothing is known that has a schema.
    """
    if isinstance(source, (dict, bool)):
        return source
    if isinstance(source, str):
        try:
            return json.loads(source)
        except json.JSONDecodeError as error:
            raise StructureError(f"the schema is no JSON: {error}") from None
    if hasattr(source, "model_json_schema"):  # pydantic
        return _closed(source.model_json_schema())
    return _schema_of_type(source)


def _closed(schema: Any) -> Any:
    """Objects of declared fields without others, unless the model says so."""
    if isinstance(schema, list):
        return [_closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    found = {k: _closed(v) for k, v in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", None: "null"}


def _schema_of_type(source: Any) -> Any:
    if source is Any:
        return True
    if source in _SCALARS if isinstance(source, type) or source is None else False:
        return {"type": _SCALARS[source]}
    origin, arguments = typing.get_origin(source), typing.get_args(source)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of_type(a) for a in arguments]}
    if source is list or origin is list:
        return {"type": "array", **({"items": _schema_of_type(arguments[0])} if arguments else {})}
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        items = [_schema_of_type(a) for a in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if source is dict or origin is dict:
        return {"type": "object", **({"additionalProperties": _schema_of_type(arguments[1])} if arguments else {})}
    if isinstance(source, type) and issubclass(source, enum.Enum):
        return {"enum": [member.value for member in source]}
    if dataclasses.is_dataclass(source):
        fields = dataclasses.fields(source)
        required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        return _schema_of_fields(typing.get_type_hints(source), required)
    if typing.is_typeddict(source):
        marks = {
            name: typing.get_origin(hint) for name, hint in typing.get_type_hints(source, include_extras=True).items()
        }
        optional = (
            typing.NotRequired if source.__total__ else None
        )  # __required_keys__ misses annotations that are strings
        required = [n for n, mark in marks.items() if mark is typing.Required or (optional and mark is not optional)]
        return _schema_of_fields(typing.get_type_hints(source), required)
    raise StructureError(
        f"no JSON Schema is known of {source!r}: give a schema, a pydantic model, a dataclass or a TypedDict"
    )


def _schema_of_fields(hints: dict[str, Any], required: list[str]) -> Any:
    properties = {name: _schema_of_type(hint) for name, hint in hints.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
