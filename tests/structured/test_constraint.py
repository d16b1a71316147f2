"""The forms in which a constraint may be given."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from hf_accel.structured.constraint import Constraint, schema_of
from hf_accel.structured.syntax import StructureError


@dataclasses.dataclass
class Address:
    street: str
    zip: int = 0


@dataclasses.dataclass
class Person:
    name: str
    kind: Literal["a", "b"]
    home: Address
    tags: list[str] = dataclasses.field(default_factory=list)
    size: float | None = None


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def accepts(constraint: Constraint, *values: Any) -> list[bool]:
    dfa = constraint.compile()
    return [dfa.accepts(json.dumps(value).encode()) for value in values]


def test_dataclasses_and_typed_dicts():
    home = {"street": "x"}
    person = Constraint.json_schema(Person)
    full = {"name": "x", "kind": "b", "home": home, "tags": ["y"], "size": None}
    assert accepts(person, full, {**full, "kind": "c"}, {**full, "more": 1}, {"name": "x"}) == [
        True,
        False,
        False,
        False,
    ]
    assert accepts(Constraint.json_schema(Movie), {"title": "x"}, {"title": "x", "year": 3}, {}) == [True, True, False]


def test_pydantic_models():
    pydantic = pytest.importorskip("pydantic")

    class Item(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=3)
        count: int = pydantic.Field(ge=0)

    class Order(pydantic.BaseModel):
        items: list[Item]
        note: str | None = None

    order = Constraint.json_schema(Order)
    item = {"name": "abc", "count": 1}
    wrong = [{"items": [{**item, "count": -1}]}, {"items": [{**item, "name": "abcd"}]}, {"items": [], "more": 1}]
    assert accepts(order, {"items": [item, item], "note": "x"}, {"items": []}, *wrong) == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert Order.model_validate_json('{"items": [{"name": "abc", "count": 1}]}')


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (int, 3, "x"),
        (float, 1.5, "x"),
        (bool, True, 1),
        (None, None, 0),
        (list[int], [1, 2], ["x"]),
        (dict[str, bool], {"a": True}, {"a": 1}),
        (tuple[int, str], [1, "x"], [1]),
        (str | int, "x", 1.5),
        (Colour, "red", "green"),
        (Any, [1, {"a": None}], None),
        ({"type": "integer"}, 1, "x"),
        ('{"const": "x"}', "x", "y"),
    ],
)
def test_types_and_schemas(source, good, bad):
    assert accepts(Constraint.json_schema(source), good) == [True]
    if source is not Any:
        assert accepts(Constraint.json_schema(source), bad) == [False]


def test_choices_and_objects():
    for choice in (Constraint.choice(["red", "blue"]), Constraint.choice(Colour)):
        assert [choice.compile().accepts(t) for t in (b"red", b"blue", b"re", b"redblue")] == [True, True, False, False]
    assert accepts(Constraint.json_object(), {"a": [1]}, {}, [1]) == [True, True, False]


def test_digests_tell_constraints_apart():
    made = [Constraint.regex("a"), Constraint.choice(["a"]), Constraint.regex("b"), Constraint.json_object()]
    made += [Constraint.json_object(whitespace=""), Constraint.json_schema({"type": "object", "title": "x"})]
    assert len({c.digest for c in made}) == len(made)
    assert Constraint.regex("a").digest == Constraint.regex("a").digest


@pytest.mark.parametrize("wrong", [object(), set[int], "{", 3])
def test_what_has_no_schema_is_refused(wrong):
    with pytest.raises(StructureError):
        schema_of(wrong) if not isinstance(wrong, int) else Constraint.json_schema(wrong)


@pytest.mark.parametrize(
    "make", [lambda: Constraint.choice([]), lambda: Constraint.choice("abc"), lambda: Constraint.regex(3)]
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(StructureError, match=r"must|needs"):
        make()


def test_a_constraint_that_allows_nothing_is_refused():
    with pytest.raises(StructureError, match="matches no text"):
        Constraint.regex(r"[^\s\S]").compile()
