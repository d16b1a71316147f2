"""Output types of outlines as constraints: what `Constraint.of` reads, and what it refuses."""

from __future__ import annotations

import json
import random
import re
import typing

import pytest

from hf_accel.structured.constraint import Constraint
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.terms import closed

types = pytest.importorskip("outlines.types")
dsl = pytest.importorskip("outlines.types.dsl")
pydantic = pytest.importorskip("pydantic")


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=120)


def random_term(depth: int):
    """A term without schemas, small enough to be matched by `re` quickly."""
    if not depth or random.random() < 0.2:
        return random.choice([dsl.String("a+"), dsl.Regex("b|c"), dsl.Regex("[de]?f"), dsl.String("(")])
    make = random.choice(["seq", "alt", "star", "plus", "optional", "exact", "least", "most", "between", "choice"])
    part = random_term(depth - 1)
    if make == "seq":
        return dsl.Sequence([part, random_term(depth - 1)])
    if make == "alt":
        return dsl.Alternatives([part, random_term(depth - 1)])
    if make == "choice":
        return types.Choice(["x", 7, "y.", part])
    return {
        "star": lambda: part.zero_or_more(),
        "plus": lambda: part.one_or_more(),
        "optional": lambda: part.optional(),
        "exact": lambda: part.exactly(2),
        "least": lambda: part.at_least(1),
        "most": lambda: part.at_most(2),
        "between": lambda: part.between(1, 2),
    }[make]()


@pytest.mark.parametrize("seed", range(12))
def test_random_terms_mean_what_outlines_prints(seed):
    random.seed(seed)
    term = random_term(3)
    dfa, pattern = Constraint.of(term).compile(), re.compile(dsl.to_regex(term))
    pieces = ["a+", "a", "b", "c", "d", "e", "f", "(", "x", "7", "y.", "yz", ""]
    found = 0
    for _ in range(1500):
        value = "".join(random.choices(pieces, k=random.randrange(6)))
        assert dfa.accepts(value.encode()) == bool(pattern.fullmatch(value)), (term, value)
        found += dfa.accepts(value.encode())
    assert found


def accepted(term, *values: str) -> list[str]:
    dfa = Constraint.of(term).compile(counting=False)
    return [v for v in values if dfa.accepts(v.encode())]


def test_schemas_stay_schemas_and_are_closed():
    good, old, more = '{"name":"ab","age":120}', '{"name":"ab","age":121}', '{"name":"ab","age":1,"x":2}'
    assert Constraint.of(types.JsonSchema(Person)).kind == "json_schema"
    assert accepted(types.JsonSchema(Person), good, old, more) == [good]
    people = dsl.python_types_to_terms(typing.List[Person])  # noqa: UP006 -- as outlines' users write it
    assert accepted(people, f"[{good}, {good}]", f"[{good}, {old}]", f"[{more}]", f"[{good}]") == [
        f"[{good}, {good}]",
        f"[{good}]",
    ]
    maybe = dsl.python_types_to_terms(typing.Optional[Person])  # noqa: UP045
    assert accepted(maybe, good, old, "None", "null") == [good, "None"]
    assert Constraint.json_schema(types.JsonSchema(Person)) == Constraint.of(types.JsonSchema(Person))


def test_whitespace_of_a_schema():
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
    assert accepted(types.JsonSchema(schema, whitespace_pattern=""), "[1, 2]", "[1,2]") == ["[1,2]"]
    assert accepted(types.JsonSchema(schema, whitespace_pattern=r"\s*"), "[1,\n 2]", "[1,2]") == ["[1,\n 2]", "[1,2]"]
    with pytest.raises(StructureError, match="whitespace_pattern"):
        Constraint.of(types.JsonSchema(schema, whitespace_pattern=" "))


def test_the_simple_terms():
    assert Constraint.of(types.Regex("a|b")) == Constraint.regex("a|b") == Constraint.regex(types.Regex("a|b"))
    assert (
        Constraint.of(types.CFG("start: A"))
        == Constraint.grammar("start: A")
        == Constraint.grammar(types.CFG("start: A"))
    )
    assert accepted(types.Choice(["red", 3]), "red", "3", "blue") == ["red", "3"]
    assert accepted(dsl.String("a.c"), "a.c", "abc") == ["a.c"]
    assert Constraint.of(Constraint.regex("a")) == Constraint.regex("a")
    assert Constraint.of({"type": "null"}) == Constraint.json_schema({"type": "null"})
    assert Constraint.of(int) == Constraint.json_schema(int)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dsl.Sequence([dsl.String("a"), types.CFG("start: A")]), "grammar cannot be part"),
        (dsl.Sequence([dsl.Regex("^a$"), dsl.String("b")]), "anchor"),
        (dsl.Sequence([dsl.Regex("(?=a)"), dsl.String("b")]), "lookahead"),
        (dsl.Term(), "term Term is not supported"),
        ("a|b", "several things"),
        (["a"], "several things"),
        (object(), "no JSON Schema"),
    ],
    ids=range(7),
)
def test_refused(source, message):
    with pytest.raises(StructureError, match=message):
        Constraint.of(source).compile()


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}]},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["b"]}]},
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"type": "object", "properties": {"b": {}}}]},
        {"const": {"type": "object", "properties": {}}},
        {"properties": {"a": {}}},
    ],
    ids=json.dumps,
)
def test_what_other_keywords_open_is_not_closed(schema):
    assert closed(schema) == schema
