"""JSON Schemas: what is accepted validates (jsonschema), valid instances are accepted, the rest is refused by name."""

from __future__ import annotations

import functools
import json
import random
from unittest.mock import patch

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hf_accel.structured import json_schema, json_values
from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.syntax import NothingMatches, NotRegular, StructureError, TooLarge

from .samples import random_text, schemas

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"address": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}},
}


@given(schemas(), st.integers(0, 1 << 30))
@settings(QUIET, max_examples=60)
def test_accepted_texts_are_valid(schema, seed):
    try:
        with patch.object(json_values, "ANY_DEPTH", 1):  # small and quick
            dfa = compile_json_schema(schema)
    except StructureError:
        assume(False)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    rng = random.Random(seed)
    for _ in range(4):
        validator.validate(json.loads(random_text(dfa, rng)))


INTEGERS = st.integers(-(10**12), 10**12)
COMPLETE = [
    (
        PERSON,
        st.fixed_dictionaries(
            {"name": st.text(min_size=1), "age": st.integers(0, 150)},
            optional={
                "tags": st.lists(st.sampled_from(["x", "y"]), max_size=3),
                "home": st.fixed_dictionaries({}, optional={"zip": st.from_regex("[0-9]{5}", fullmatch=True)}),
            },
        ).map(lambda person: {name: person[name] for name in PERSON["properties"] if name in person}),
    ),
    (
        {"type": "array", "items": {"type": ["integer", "null", "boolean"]}, "minItems": 1, "maxItems": 4},
        st.lists(st.one_of(INTEGERS, st.none(), st.booleans()), min_size=1, max_size=4),
    ),
    (
        {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "exclusiveMinimum": 3, "multipleOf": 5}]},
        st.one_of(st.text(max_size=5), st.integers(1, 10**9).map(lambda n: 5 * n)),
    ),
    ({"allOf": [{"type": "integer", "minimum": 0}, {"maximum": 90}]}, st.integers(0, 90)),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        st.one_of(st.just([]), st.tuples(INTEGERS).map(list), st.tuples(INTEGERS, st.text()).map(list)),
    ),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, st.dictionaries(st.text(), INTEGERS)),
    ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False)),
    ({"type": "number", "minimum": -2.5, "maximum": 100}, st.integers(-25, 1000).map(lambda n: n / 10)),
    (
        True,
        st.recursive(
            st.none() | st.text() | INTEGERS, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=3
        ),
    ),
]


compiled = functools.cache(compile_json_schema)


@pytest.mark.parametrize(("schema", "instances"), COMPLETE)
@given(data=st.data())
@settings(QUIET, max_examples=12)
def test_valid_instances_are_accepted(schema, instances, data):
    value, dfa = data.draw(instances), compiled(json.dumps(schema))
    for options in ({}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        assert dfa.accepts(json.dumps(value, **options).encode()), value


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "number"}, ["0", "-0.5", "1e5", "2E-3"], ["01", ".5", "1.", "+1"]),
        ({"type": "string", "pattern": "^a|b$"}, ['"a"', '"xb"', r'"\u0061"'], ['"x"', '"', "a"]),
        ({"type": "string", "maxLength": 1}, ['"\U0001f600"', r'"\ud83d\ude00"', r'"\n"'], ['"ab"', r'"\ud83d"']),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.1", "3"], ["0", "-0", "0.0"]),
        ({"type": "integer", "multipleOf": 12}, ["0", "-24", "144"], ["6", "-1"]),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"2023-13-01"']),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"properties": {"a": False}, "type": "object"}, ["{}", '{"b": 1}'], ['{"a": 1}', r'{"\u0061": 1}']),
        (
            {
                "type": "object",
                "patternProperties": {"^n": {"type": "null"}},
                "additionalProperties": {"type": "integer"},
            },
            ['{"n": null, "m": 1}', "{}"],
            ['{"n": 1}', '{"m": null}'],
        ),
        (
            {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "object", "required": ["k"]}]},
            ["1", '"x"', '{"k": 1}'],
            ["1.5", "null", "{}"],
        ),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": "x"}}}, ['"x"'], ['"y"']),
        ({"$ref": "#it", "$defs": {"d": {"$anchor": "it", "type": "null"}}}, ["null"], ["1"]),
        ({"items": [{"type": "null"}], "additionalItems": False, "type": "array"}, ["[null]", "[]"], ["[null, 1]"]),
    ],
)
def test_texts(schema, valid, invalid):
    dfa = compile_json_schema(json.dumps(schema))
    assert all(dfa.accepts(t.encode()) for t in valid)
    assert not any(dfa.accepts(t.encode()) for t in invalid)


def test_whitespace():
    compact = compile_json_schema(PERSON, whitespace="")
    spaced, tight = json.dumps({"name": "x", "age": 1}), json.dumps({"name": "x", "age": 1}, separators=(",", ":"))
    assert compact.accepts(tight.encode()) and not compact.accepts(spaced.encode())
    assert compile_json_schema(PERSON).accepts(spaced.encode())


def test_discriminated_one_of():
    schema = {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": kind}, "v": {"type": value}}, "required": ["k"]}
            for kind, value in (("x", "integer"), ("y", "string"))
        ]
    }
    dfa = compile_json_schema(schema)
    assert (
        dfa.accepts(b'{"k":"x","v":3}') and dfa.accepts(b'{"k":"y","v":"s"}') and not dfa.accepts(b'{"k":"x","v":"s"}')
    )


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "no JSON"),
        ({"not": {"type": "string", "format": "date"}}, "format 'date' is not supported under not"),
        ({"not": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "items": {"enum": list(range(9))}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "uniqueItems": True, "items": {"type": "boolean"}, "contains": {}}, "uniqueItems"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}, "'unevaluatedProperties'"),
        ({"type": "object", "patternProperties": {"(": {}}, "properties": {"a": {}}}, "not a regular expression"),
        ({"type": "number", "minimum": float("inf")}, "minimum must be a number"),
        ({"$dynamicRef": "#a"}, "'\\$dynamicRef'"),
        ({"extends": {}}, "draft 3"),
        ({"type": "string", "nullable": True}, "'nullable'"),
        ({"type": "string", "format": "color"}, "format 'color'"),
        ({"type": "object", "required": True}, "required must be a list of strings"),
        ({"properties": []}, "properties must be an object of schemas"),
        ({"anyOf": []}, "anyOf must be"),
        ({"type": "string", "pattern": "(?=a)"}, "lookahead"),
        ({"type": "number", "multipleOf": 0}, "multipleOf"),
        ({"type": "number", "multipleOf": 1.2345678}, "multipleOf"),
        ({"not": {}}, "allows no value"),
        ({"type": "text"}, "unknown type 'text'"),
        ({"$ref": "other.json#/a"}, "remote"),
        ({"$ref": "#/$defs/none"}, "names nothing"),
        ({"type": "array", "items": {"$ref": "#"}}, "recursive"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "allows no value"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "allows no value"),
        ({"oneOf": [{"format": "date"}, {"maxLength": 3}], "type": "string"}, "oneOf.*format 'date'"),
        ({"type": "string", "maxLength": 1_000_000, "pattern": "^a"}, "states"),
        ({"type": "string", "minLength": -1}, "minLength"),
        (3, "must be an object"),
    ],
)
def test_refusals_name_the_keyword(schema, message):
    with pytest.raises(StructureError, match=message):
        compile_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"$ref": "#"}},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"properties": {"b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}},
        },
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"not": {"properties": {"a": {"not": {"$ref": "#"}}}}},
    ],
)
def test_recursion_is_not_regular(schema):
    with pytest.raises(NotRegular, match="recursive"):
        compile_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 1_000_000, "pattern": "^a"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 5000, "contains": {"const": 1}},
    ],
)
def test_what_passes_the_caps_is_too_large(schema):
    with pytest.raises(TooLarge):
        compile_json_schema(schema)


def test_what_certainly_matches_nothing_is_told_from_what_is_only_approached():
    with pytest.raises(NothingMatches):
        compile_json_schema({"type": "integer", "minimum": 3, "maximum": 2})
    with pytest.raises(StructureError, match="no value") as caught:
        compile_json_schema({"type": "string", "format": "ipv4", "pattern": "x"})
    assert not isinstance(caught.value, NothingMatches)


def test_too_many_combinations_are_too_large():
    schema = {"allOf": [{"not": {"required": [f"a{i}", f"b{i}"]}} for i in range(6)], "type": "object"}
    small = patch.object(json_values, "ANY_DEPTH", 0)
    with small, patch.object(json_schema, "MAX_CONJUNCTIONS", 20), pytest.raises(TooLarge, match="combinations"):
        compile_json_schema(schema)
