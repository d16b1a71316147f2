"""Keyword by keyword: which texts are accepted and which are not; negation is of values, in whatever spelling."""

from __future__ import annotations

import json
import logging
from decimal import Decimal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_accel.structured import json_values
from hf_accel.structured.automaton import compile_node
from hf_accel.structured.json_formats import FORMATS
from hf_accel.structured.json_multiples import multiples_dfa, no_multiples_dfa
from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.regex import parse_search

INT, STR = {"type": "integer"}, {"type": "string"}
AB = {"type": "object", "properties": {"a": INT, "b": INT}}
CASES = [
    # not
    ({"not": STR}, ["1", "1.5", "null", "[]", "{}", "false"], ['"a"']),
    ({"not": INT}, ["1.5", '"a"'], ["1", "-2", "1.0"]),
    ({"type": "number", "not": INT}, ["0.25", "-1.50"], ["1", "1.0", "10e-1"]),
    ({"type": "string", "not": {"const": "ab"}}, ['"a"', '"abc"'], ['"ab"', r'"\u0061b"']),
    ({"type": "number", "not": {"const": 1}}, ["2", "1.5"], ["1", "1.0", "1.00", "1e0"]),
    ({"type": "boolean", "not": {"enum": [True, 1]}}, ["false"], ["true"]),
    ({"type": "array", "not": {"const": [1]}}, ["[]", "[2]", "[1, 1]", "[[1]]"], ["[1]", "[1.0]"]),
    (
        {"type": "object", "not": {"const": {"a": 1}}},
        ["{}", '{"a": 2}', '{"a": 1, "b": 1}'],
        ['{"a": 1}', r'{"\u0061": 1}'],
    ),
    ({"type": "integer", "not": {"minimum": 3}}, ["2"], ["3", "4"]),
    ({"type": "integer", "not": {"exclusiveMaximum": 3}}, ["3"], ["2"]),
    ({"type": "string", "not": {"minLength": 2, "maxLength": 3}}, ['"a"', '"abcd"'], ['"ab"', '"abc"']),
    ({"type": "string", "not": {"pattern": "^a"}}, ['"ba"', '""'], ['"a"', r'"\u0061"']),
    ({"type": "string", "not": {"pattern": "^a$"}}, ['"ba"'], ['"a"', r'"a\n"']),
    ({"type": "string", "not": {"pattern": r"^\d+$"}}, ['"x"', '""'], ['"1"', '"\u0661"']),
    ({"type": "integer", "not": {"multipleOf": 3}}, ["1", "-4"], ["0", "3", "-6"]),
    ({"type": "number", "not": {"multipleOf": 0.5}}, ["0.25", "1.75"], ["0", "1", "1.50", "2.0"]),
    ({**AB, "not": {"required": ["a"]}}, ["{}", '{"b": 1}'], ['{"a": 1}']),
    ({**AB, "not": {"required": ["a", "b"]}}, ["{}", '{"b": 1}', '{"a": 1}', '{"c": 1}'], ['{"a": 1, "b": 2}']),
    (
        {**AB, "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}},
        ["{}", '{"c": 1}'],
        ['{"a": 1}', '{"b": 1}'],
    ),
    ({"type": "object", "not": {"properties": {"a": INT}}}, ['{"a": null}'], ["{}", '{"a": 1}']),
    (
        {"type": "object", "not": {"additionalProperties": INT}},
        ['{"a": ""}', '{"a": 1, "b": ""}'],
        ["{}", '{"b": "", "b": 1}'],
    ),
    ({"type": "object", "not": {"patternProperties": {"^x": STR}}}, ['{"x": 1}'], ["{}", '{"x": ""}', '{"y": 1}']),
    ({"type": "object", "not": {"propertyNames": {"maxLength": 1}}}, ['{"xy": 1}'], ["{}", '{"x": 1}']),
    (
        {"type": "object", "not": {"propertyNames": {"not": {"enum": ["p", "q"]}}}},
        ['{"q": 1}', '{"p": 1, "r": 1}'],
        ["{}", '{"r": 1}'],
    ),
    ({"type": "object", "not": {"minProperties": 1}}, ["{}"], ['{"x": 1}']),
    ({"type": "array", "not": {"items": INT}}, ['["a"]', '[1, "a"]'], ["[]", "[1]"]),
    ({"type": "array", "not": {"prefixItems": [INT]}}, ['["a"]'], ["[]", "[1]", '[1, "a"]']),
    ({"type": "array", "not": {"contains": INT}}, ["[]", '["a"]'], ["[1]", '["a", 1]']),
    ({"type": "array", "not": {"minItems": 1, "maxItems": 1}}, ["[]", "[1, 2]"], ["[1]"]),
    ({"not": {"not": INT}}, ["1"], ['"a"', "1.5"]),
    ({"type": "integer", "not": {"oneOf": [{"minimum": 0}, {"maximum": 9}]}}, ["0", "9"], ["-1", "10"]),
    ({"type": "integer", "not": {"$ref": "#/$defs/d"}, "$defs": {"d": {"minimum": 3}}}, ["2"], ["3"]),
    ({**AB, "not": {"dependentRequired": {"a": ["b"]}}}, ['{"a": 1}'], ["{}", '{"a": 1, "b": 1}']),
    ({"type": "string", "not": {"pattern": r"^\w+$"}}, ['"a b"', '""'], ['"ab"', '"\u00e9"']),
    # if, oneOf
    (
        {"if": {"type": "integer"}, "then": {"minimum": 3}, "else": {"type": "string"}},
        ["3", '"a"'],
        ["2", "1.5", "null"],
    ),
    ({"type": "integer", "if": {"minimum": 3}, "else": False}, ["3"], ["2"]),
    ({"type": "integer", "then": False, "else": False}, ["3"], ['"a"']),
    ({"oneOf": [INT, {"type": "number"}]}, ["1.5"], ["1", '"a"']),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], **AB}, ['{"a": 1}', '{"b": 1}'], ["{}", '{"a": 1, "b": 1}']),
    ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 1}]}, ['"ab"'], ['"a"', '""']),
    # arrays
    ({"type": "array", "contains": INT}, ["[1]", '["a", 1, "b"]'], ["[]", '["a"]']),
    (
        {"type": "array", "contains": INT, "minContains": 2, "maxContains": 3},
        ['["a", 1, "b", 2, 3]', "[1, 1]"],
        ["[1]", "[1, 1, 1, 1]"],
    ),
    ({"type": "array", "contains": INT, "minContains": 0}, ["[]", '["a"]'], ["1"]),
    ({"type": "array", "items": {"enum": ["a", 1]}, "uniqueItems": True}, ["[]", '[1, "a"]'], ['["a", "a"]']),
    (
        {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 2},
        ["[false, true]"],
        ["[true]"],
    ),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[]", "[3]"], ["[3, 4]"]),
    # objects
    ({"type": "object", "minProperties": 1}, ['{"a": 1}', '{"a": 1, "b": 2}'], ["{}"]),
    ({**AB, "minProperties": 2}, ['{"a": 1, "b": 2}', '{"a": 1, "c": 2}'], ["{}", '{"a": 1}', '{"c": 1, "c": 2}']),
    ({"type": "object", "maxProperties": 1}, ["{}", '{"a": 1}'], ['{"a": 1, "b": 2}']),
    ({**AB, "maxProperties": 1}, ["{}", '{"b": 1}', '{"c": 1}'], ['{"a": 1, "b": 2}', '{"a": 1, "c": 1}']),
    ({**AB, "dependentRequired": {"b": ["a"]}}, ["{}", '{"a": 1}', '{"a": 1, "b": 1}', '{"c": 1}'], ['{"b": 1}']),
    ({**AB, "dependencies": {"a": ["c"]}}, ["{}", '{"a": 1, "c": 1}', '{"b": 1}'], ['{"a": 1}']),
    ({**AB, "dependencies": {"a": "b"}}, ['{"a": 1, "b": 1}', "{}"], ['{"a": 1}']),
    (
        {**AB, "dependentSchemas": {"a": {"properties": {"b": {"minimum": 3}}}}},
        ['{"b": 1}', '{"a": 1, "b": 3}', '{"a": 1}'],
        ['{"a": 1, "b": 1}'],
    ),
    ({**AB, "propertyNames": {"maxLength": 2}}, ['{"a": 1, "xy": 1}'], ['{"xyz": 1}']),
    ({**AB, "propertyNames": {"enum": ["b", "c"]}}, ['{"b": 1}', '{"c": null}'], ['{"a": 1}', '{"d": 1}']),
    ({**AB, "required": ["z", "y"]}, ['{"z": 1, "y": 1}'], ["{}", '{"z": 1}']),
    (AB, ['{"a": 1, "x": 1}'], ['{"x": 1, "a": 1}', '{"a": 1, "a": 1}', r'{"a": 1, "\u0061": ""}']),
    # numbers, drafts, annotations, references
    ({"type": "number", "multipleOf": 0.01}, ["1.23", "5", "-0.5"], ["1.234", "0.001"]),
    ({"type": "integer", "multipleOf": 2.5}, ["5", "0", "-10"], ["2.5", "3"]),
    ({"type": "number", "multipleOf": 0.5, "exclusiveMaximum": 2}, ["1.5", "-3"], ["2", "0.7"]),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": False}, ["3"], ["2"]),
    ({"type": "integer", "format": "int32"}, ["2147483647"], ["2147483648"]),
    (
        {"type": "integer", "title": "x", "default": "y", "readOnly": True, "contentEncoding": "z", "x-y": 1},
        ["3"],
        ['"y"'],
    ),
    ({"$id": "http://x/y", "$ref": "http://x/y#/$defs/a", "$defs": {"a": INT}}, ["3"], ['"y"']),
    (
        {"$ref": "sub", "$defs": {"a": {"$id": "sub", "$ref": "#/$defs/b", "$defs": {"b": INT}}, "b": STR}},
        ["3"],
        ['"y"'],
    ),
    ({"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": INT}}, ["3"], ['"y"']),
    ({"enum": [1, "a", None], "type": ["string", "null"]}, ['"a"', "null"], ["1"]),
    ({"enum": [1.0, 5, 1e30], "minimum": 1, "type": "number"}, ["1.0", "5", "1e+30"], ["7", "0"]),
    ({"enum": ["x", "y" * 99], "maxLength": 30}, ['"x"'], [f'"{"y" * 99}"']),
    ({**AB, "unevaluatedProperties": False}, ['{"a": 1}'], ['{"c": 1}']),
    ({"type": "array", "prefixItems": [INT], "unevaluatedItems": False}, ["[1]"], ["[1, 1]"]),
    (
        {"type": "object", "propertyNames": {"maxLength": 20}, "properties": {"n" * 21: {}}},
        ["{}"],
        [f'{{"{"n" * 21}": 1}}'],
    ),
    ({"enum": [{"a": 1}, {"b": 1}], "required": ["a"]}, ['{"a": 1}'], ['{"b": 1}']),
]


@pytest.fixture(autouse=True)
def small_values(monkeypatch):
    """Values that a schema says nothing of are of depth 1: the automata are small and quick."""
    monkeypatch.setattr(json_values, "ANY_DEPTH", 1)


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES, ids=lambda case: json.dumps(case)[:60])
def test_texts(schema, valid, invalid):
    dfa = compile_json_schema(schema)
    assert [t for t in valid if not dfa.accepts(t.encode())] == []
    assert [t for t in invalid if dfa.accepts(t.encode())] == []


@pytest.mark.parametrize(
    "case", [c for c in CASES if not {"dependencies", "exclusiveMinimum", "format"} & c[0].keys()][::3]
)
def test_the_cases_agree_with_jsonschema(case):
    schema, valid, invalid = case
    validator = jsonschema.Draft202012Validator(schema)
    assert all(validator.is_valid(json.loads(t)) for t in valid)
    order = [t for t in invalid if validator.is_valid(json.loads(t))]
    assert all(t.startswith("{") for t in order), "only the order of names, and one that stands twice, are ours"


@given(
    st.sampled_from(["0.01", "0.5", "2.5", "3", "0.125", "1.2", "40"]),
    st.decimals(-999, 999, places=4),
    st.integers(0, 4),
)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_multiples_are_exact(divisor, value, places):
    value = round(value, places)
    number = float(divisor) if "." in divisor else int(divisor)
    text, multiple = f"{value:f}", value % Decimal(divisor) == 0
    assert no_multiples_dfa(number, integers=False).accepts(text.encode()) == (not multiple)
    if not multiple or "." in divisor or places == 0:
        assert multiples_dfa(number).accepts(text.encode()) == multiple


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("json-pointer", ["", "/a~1b/0"], ["a", "/~2"]),
        ("relative-json-pointer", ["0", "1/a", "2#"], ["/a", "01"]),
        ("uri-reference", ["a/b?c#d", "/x", "#f", "http://x/y", "", "//h/p"], ["a b", "\\x"]),
        ("uri-template", ["http://x/{a,b*}/{?c:3}"], ["{", "a b"]),
        ("regex", ["^a[0-9]*$", "x|y", r"\d+"], ["[", "(", "*a{"]),
        ("byte", ["", "YWI="], ["YWI"]),
        ("idn-hostname", ["a.b"], ["a_b"]),
    ],
)
def test_formats(name, valid, invalid):
    dfa = compile_json_schema({"type": "string", "format": name})
    assert [t for t in valid if not dfa.accepts(json.dumps(t).encode())] == []
    assert [t for t in invalid if dfa.accepts(json.dumps(t).encode())] == []


def test_formats_that_nobody_defines_are_annotations_and_said_to_be(caplog):
    assert "made-up" not in FORMATS
    with caplog.at_level(logging.WARNING):
        dfa = compile_json_schema({"type": "string", "format": "made-up"})
    assert "made-up" in caplog.text and dfa.accepts(b'"anything"')


@pytest.mark.parametrize(
    ("pattern", "text", "narrow", "wide"),
    [
        (r"^\d$", "\u0661", False, True),
        ("^.$", "\r", False, True),
        ("^a$", "a\n", False, True),
        ("^[^\\d]$", "\u0661", False, True),
    ],
)
def test_where_readings_of_a_pattern_differ(pattern, text, narrow, wide):
    assert compile_node(parse_search(pattern)).accepts(text.encode()) == narrow
    assert compile_node(parse_search(pattern, wide=True)).accepts(text.encode()) == wide


def test_a_keyword_that_looks_misspelt_is_said_to_be(caplog):
    compile_json_schema(
        {"type": "string", "minLenght": 3, "x-note": 1, "title": "T", "description": "d", "format_": "x"}
    )
    said = {tuple(r.getMessage().split("'")[1::2]) for r in caplog.records}
    assert said == {("minLenght", "minLength"), ("format_", "format")}
