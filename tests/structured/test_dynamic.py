"""The dynamic backend: masks equal brute force, matchers go to and fro, schemas mean what they say, refusals are loud."""

from __future__ import annotations

import json
import random
import re
import sys

import jsonschema
import pytest

pytest.importorskip("llguidance")

from hf_accel.structured.compiler import ConstraintCompiler
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.dynamic import DynamicGrammar
from hf_accel.structured.json_dynamic import pattern_for_llguidance
from hf_accel.structured.json_endless import is_endless
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import TokenFsm
from hf_accel.structured.vocabulary import Vocabulary

from .grammars import ARITHMETIC, ARITHMETIC_GBNF, TREE, accepts, allowed, byte_vocabulary, compiled, scan_arithmetic

# Two tokens of equal bytes, a special one, tokens over several terminals, one that is never legal.
VOCABULARY = byte_vocabulary(b"12", b"1+", b")*(", b"((", b"99", b"99", None, b"+-", b"0)+(4", b"\xff1", eos=2)


@pytest.mark.parametrize("grammar", [ARITHMETIC, ARITHMETIC_GBNF], ids=["lark", "gbnf"])
def test_masks_equal_brute_force(grammar):
    found = compiled(Constraint.grammar(grammar), VOCABULARY)
    rng = random.Random(3)
    matcher = found.matcher()
    for _ in range(60):
        tokens: list[int] = []
        text = b""
        for _ in range(rng.randrange(12)):
            choices = [i for i, t in enumerate(VOCABULARY.tokens) if t and scan_arithmetic(text + t)[0]]
            tokens.append(rng.choice(choices))
            text += VOCABULARY.tokens[tokens[-1]]
        expected = {i for i, t in enumerate(VOCABULARY.tokens) if t and scan_arithmetic(text + t)[0]}
        if scan_arithmetic(text)[1]:
            expected |= set(VOCABULARY.eos_token_ids)
        matcher.move_to(tokens)  # from wherever it stood: takes back, goes on
        assert allowed(matcher) == expected, text
        assert allowed(matcher) == expected, "a mask changes nothing"


def test_what_ends_a_row_ends_it_until_it_is_taken_back():
    matcher = compiled(Constraint.grammar(ARITHMETIC), VOCABULARY).matcher()
    ends, special = set(VOCABULARY.eos_token_ids), 256 + 6
    for last in (*ends, special, 10_000, ord("x")):
        matcher.move_to([ord("7"), last, 0, 0])
        assert matcher.done and allowed(matcher) == ends
        matcher.move_to([ord("7")])
        assert not matcher.done and ends < allowed(matcher)
    matcher.move_to([])
    assert not ends & allowed(matcher)


def random_tree(rng: random.Random, depth: int = 0) -> dict:
    tree = {"v": rng.randrange(10)}
    if rng.random() < 0.7 and depth < 6:
        tree["kids"] = [random_tree(rng, depth + 1) for _ in range(rng.randrange(4))]
    return tree


def test_a_recursive_schema():
    assert isinstance(compiler().compile(Constraint.json_schema(TREE)), DynamicGrammar)
    compact, default = (compiled(Constraint.json_schema(TREE, whitespace=w)) for w in ("", " ?"))
    rng = random.Random(5)
    for _ in range(40):
        tree = random_tree(rng)
        short, spaced = json.dumps(tree, separators=(",", ":")), json.dumps(tree)
        assert accepts(default, short) and accepts(default, spaced)
        assert accepts(compact, short) and accepts(compact, spaced) == (spaced == short)
        broken = (
            spaced.replace(str(tree["v"]), '"x"', 1) if rng.random() < 0.5 else spaced[: rng.randrange(len(spaced))]
        )
        assert not accepts(default, broken)
    for text in (
        '{"v":10}',
        '{"v":1,"w":1}',
        '{"kids":[]}',
        '{"v":1}}',
        ' {"v":1}',
        '{"v":1,"kids":[{"v":1,"kids":[{}]}]}',
    ):
        assert not accepts(default, text)


def compiler() -> ConstraintCompiler:
    return ConstraintCompiler(byte_vocabulary())


def test_what_has_an_automaton_gets_one():
    for constraint in (Constraint.regex("a+"), Constraint.json_schema({"type": "integer"}), Constraint.choice(["a"])):
        assert isinstance(compiler().compile(constraint), TokenFsm)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"minimum": 3, "anyOf": [{"type": "integer"}], "exclusiveMinimum": True}, [4], [3, 2]),
        (
            {"items": [{"type": "integer"}], "anyOf": [{"type": "array"}], "additionalItems": False},
            [[1]],
            [[1, 2], ["a"]],
        ),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[], [1]], [[1, 1]]),
        ({"type": "object", "minProperties": 2, "required": ["a", "b"]}, [{"a": 1, "b": 2}], [{"a": 1}]),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 3}, [3], [4]),
        ({"x-guidance": {"lenient": True, "whitespace_flexible": True}, "const": [1, 2]}, [[1, 2]], [[1]]),
        ({"type": "string", "pattern": r"^[^\W\d]$|x[[&~]\S"}, None, None),
        ({"not": {"type": "string"}}, None, None),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "if": True, "else": False}, None, None),
        ({"x-guidance": {"lenient": True}, "contains": {"const": 1}}, None, None),
        ({"type": "object", "minProperties": 2}, None, None),
        ({"type": "array", "uniqueItems": True}, None, None),
        ({"const": 9007199254740993}, None, None),
        ({"enum": [{"a": [10**20]}]}, None, None),
        ({"type": "string", "format": "no such format"}, None, None),
        ({"$ref": "https://example.com/schema"}, None, None),
        ({"anyOf": [{"properties": {"a": {"propertyNames": {"const": "b"}}}}]}, None, None),
        ({"type": "string", "pattern": "a++b"}, None, None),
        ({"type": "string", "pattern": "[+--]"}, None, None),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, None, None),
    ],
    ids=str,
)
def test_a_schema_is_taken_as_it_is_meant_or_refused(schema, good, bad):
    if good is None:
        with pytest.raises(StructureError):
            compiled(Constraint.json_schema(schema))
        return
    found = compiled(Constraint.json_schema(schema))
    for value in good:
        assert accepts(found, json.dumps(value)), value
    for value in bad:
        assert not accepts(found, json.dumps(value)), value


PATTERNS = [
    r"\W",
    r"\D\d",
    r"^\S+$",
    r"[^\w]",
    r"[^\d\s]",
    r"[\W]",
    r"[\Sa]",
    r"^[^\]a]$",
    r"^[]a]$",
    r"^[^]\s]$",
    r"\.|\-$",
]
CHARACTERS = "aZ09_ \t\n\x1c\x1f\x85\xa0é²५Ⅷ中\u0301\u200b]-.[&~"


@pytest.mark.parametrize("pattern", [*PATTERNS, r"x[&&a]"])
def test_a_pattern_finds_no_more_than_pythons_search(pattern):
    found = compiled(Constraint.json_schema({"type": "string", "pattern": pattern}))
    texts = [*CHARACTERS, *(a + b for a in CHARACTERS[:9] for b in CHARACTERS), *("x" + c for c in CHARACTERS)]
    taken = [t for t in texts if accepts(found, json.dumps(t, ensure_ascii=False)) or accepts(found, json.dumps(t))]
    assert taken and all(re.search(pattern, t) for t in taken)
    missed = [t for t in texts if t not in taken and re.search(pattern, t)]
    assert all(not t.isascii() or not t.isprintable() for t in missed)


def test_what_a_pattern_becomes():
    assert pattern_for_llguidance(r"^a[\d.]\S$") == r"^a[\d.][^\s\x{1c}-\x{1f}]$"


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: foo", 'unknown name: "foo"'),
        ('start: "a" ??', "Expected value"),
        ("start: /a(?=b)/", "look-around"),
        ("sum: x", "start"),
        ('start: <think> "a"', "special token"),
        ("start: <[5]> /[<]/", "special token"),
        ('start: x\nx[stop="b"]: /.*/', "stop"),
        ("start: x\nx[max_tokens=3]: /.*/", "max_tokens"),
        ('start: x\nx[temperature=0.5]: "a"', "temperature"),
        ('%llguidance {"allow_invalid_utf8": true}\nstart: "a"', "allow_invalid_utf8"),
        ("root ::= foo", "line 1 names the rule 'foo'"),
        ("start: x\nx: x", "no way on"),
    ],
)
def test_a_wrong_grammar_is_refused_with_the_reason(grammar, message):
    with pytest.raises(StructureError, match=message):
        compiler().compile(Constraint.grammar(grammar))


def test_marks_inside_texts_are_no_special_tokens():
    found = compiled(Constraint.grammar(r'start: "<[5]>" /<a[\/>]/ "stop=" // <think>'))
    assert accepts(found, "<[5]><a/stop=")


def test_a_refusal_of_both_names_both_reasons():
    with pytest.raises(StructureError, match=r"uniqueItems is supported only.*Unimplemented keys"):
        compiler().compile(Constraint.json_schema({"type": "array", "uniqueItems": True}))
    with pytest.raises(StructureError, match=r"allows no value at all[^(]*$"):  # lost for any backend
        compiler().compile(Constraint.json_schema({"type": "integer", "minimum": 3, "maximum": 2}))


LINK = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "endless"),
    [
        ({"$ref": "#"}, True),
        (LINK, True),
        ({**LINK, "required": []}, False),
        ({**LINK, "type": ["object", "null"]}, False),
        ({k: v for k, v in LINK.items() if k != "type"}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"type": "array", "items": {"$ref": "#"}}, False),
        ({"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 1}, False),
        ({"type": "array", "items": [{"type": "null"}, {"$ref": "#"}], "minItems": 2}, True),
        ({"anyOf": [LINK, {"type": "array", "items": {"$ref": "#"}, "minItems": 2}]}, True),
        ({"anyOf": [LINK, {"type": "null"}]}, False),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, True),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "null"}}, "allOf": [{"$ref": "#/$defs/a"}]}, False),
        ({"$ref": "#/$defs/missing"}, False),
    ],
    ids=str,
)
def test_schemas_without_a_finite_value(schema, endless):
    assert is_endless(schema) == endless
    if endless:
        with pytest.raises(StructureError, match="without end"):
            compiled(Constraint.json_schema(schema))


def test_without_llguidance_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for constraint in (Constraint.grammar(ARITHMETIC), Constraint.json_schema(TREE)):
        with pytest.raises(StructureError, match=r"pip install 'hf-accel\[grammar\]'"):
            compiler().compile(constraint)
    assert isinstance(compiler().compile(Constraint.regex("a")), TokenFsm)


def test_a_vocabulary_that_cannot_go_on_says_so():
    tokens = tuple(bytes([b]) if b != ord("c") else None for b in range(256))
    found = compiled(Constraint.grammar('start: "a" "b" "c" | "x"'), Vocabulary((*tokens, None), (256,)))
    matcher = found.matcher()
    matcher.move_to([ord("a"), ord("b")])
    with pytest.raises(StructureError, match="no way on after 2 tokens"):
        matcher.mask()
    matcher.move_to([ord("x")])  # and it may be used again
    assert allowed(matcher) == {256}


def test_byte_fallback_and_word_pieces_with_spaces():
    """As SentencePiece has it: bytes by a token each, words that begin with a space, characters."""
    byte_tokens = [bytes([b]) for b in range(256)]
    words = [" é", "é", " ", "中", "文", "a", " a"]
    tokens = (None, None, *byte_tokens, *(w.encode() for w in words))
    found = compiled(Constraint.grammar("start: /( ?[é中])+/"), Vocabulary(tokens, (1,)))
    ids = {t: i for i, t in reversed(list(enumerate(tokens)))}
    matcher = found.matcher()
    spelled = [[ids[" é".encode()]], [ids[b" "], ids[b"\xc3"], ids[b"\xa9"]], [258 + 2, ids["é".encode()]]]
    for way in spelled:
        matcher.move_to(way)
        assert not matcher.done and 1 in allowed(matcher)
    matcher.move_to([ids[b"\xe4"]])
    assert allowed(matcher) == {ids[b"\xb8"]}  # inside a character
    matcher.move_to([])
    assert allowed(matcher) == {ids[t] for t in (b"\xc3", b"\xe4", "é".encode(), " é".encode(), "中".encode())} | {
        ids[b" "],
        258 + 2,
    }


def test_schemas_of_the_dynamic_backend_are_sound_on_random_texts():
    """Every text that masks let through to an end validates."""
    rng = random.Random(11)
    schema = {
        "$defs": {
            "any": {
                "anyOf": [{"type": "integer", "multipleOf": 3}, {"type": "array", "items": {"$ref": "#/$defs/any"}}]
            }
        },
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/any"}, "s": {"type": "string", "pattern": r"^\S\W?$"}},
        "required": ["a"],
        "patternProperties": {"^[xy]": {"$ref": "#/$defs/any"}},
        "additionalProperties": {"enum": [None, "é"]},
    }
    found, num_done = compiled(Constraint.json_schema(schema)), 0
    validator = jsonschema.Draft202012Validator(schema)
    for _ in range(60):
        matcher, tokens = found.matcher(), []
        while len(tokens) < 80:
            choices = sorted(allowed(matcher))
            closing = [c for c in choices if c in (256, *b'"]}')]
            tokens.append(rng.choice(closing if closing and rng.random() < 0.5 else choices))
            matcher.move_to(tokens)
            if matcher.done:
                validator.validate(json.loads(bytes(tokens[:-1])))
                num_done += 1
                break
    assert num_done > 20
