"""Patterns against `re.fullmatch`, on texts made to match and on texts near them."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_accel.structured.automaton import compile_node
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import StructureError

ALPHABET = list('ab01.-, _\nAB"\\éßſ漢²\u212aK\U0001f600')
PATTERNS = [
    r"-?[0-9]+(\.[0-9]+)?",
    r"^\d{2}-\d$",
    r"\Aa*?b+\Z",
    r"(?:^a|b$|)",
    r"(?i)[a-k]ß?S*",
    r"(?i:a)b(?-i:A)?",
    r"(?a)\w+\s?",
    r"(?s).{2,3}",
    r"(?m)^a.?$",
    r"(?x) a  b? # no comment",
    r"[^\W\d_]+",
    r"\W\D\S",
    r"(?P<x>a|ab)(c|bcd)?(d*)",
    r"a{2,}b{,2}",
    r"(?:a?){3}a{2}",
    r"[\s\S]*",
    r"(^a)?b",
    r"\u6f22|\x41|\101",
    r"",
    r"[^a]",
    r"(?i)[^k]",
    r"(?a:\w(?i:ß|k)(?u:\w)?)\w?",
    r"(?ai)(?u:k|\w\d)[k-s]?",
]
ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\s", "é", r"\.", "[0-1_]", "(?i:k)"])


@st.composite
def patterns(draw, depth=3):
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return draw(ATOMS)
    inner = patterns(depth=depth - 1)
    kind = draw(st.sampled_from(["seq", "alt", "repeat"]))
    if kind == "seq":
        return draw(inner) + draw(inner)
    if kind == "alt":
        return f"(?:{draw(inner)}|{draw(inner)})"
    return f"(?:{draw(inner)}){draw(st.sampled_from(['*', '+', '?', '{2}', '{1,3}', '{2,}', '*?']))}"


def check(pattern: str, texts) -> None:
    dfa, expected = compile_node(parse_regex(pattern)), re.compile(pattern)
    for text in texts:
        assert dfa.accepts(text.encode()) == bool(expected.fullmatch(text)), (pattern, text)


def random_texts(count: int) -> list[str]:
    return ["".join(random.choices(ALPHABET, k=random.randint(0, 5))) for _ in range(count)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_patterns(pattern):
    check(pattern, ["", "ab", "a\n", "b", "aab", "abcd", *random_texts(500)])


@given(patterns(), st.lists(st.text(st.sampled_from(ALPHABET), max_size=5), max_size=30))
@settings(max_examples=60, deadline=None)
def test_random_patterns(pattern, texts):
    check(pattern, texts)


@given(patterns(), st.data())
@settings(max_examples=40, deadline=None)
def test_texts_that_match_are_accepted(pattern, data):
    text = data.draw(st.from_regex(re.compile(pattern), fullmatch=True).filter(lambda t: t.isprintable()))
    assert compile_node(parse_regex(pattern)).accepts(text.encode())


@pytest.mark.parametrize(
    ("pattern", "construct"),
    [
        ("a(?=b)", "lookahead"),
        ("a(?<!b)", "negative lookahead"),
        (r"(a)\1", "backreference"),
        (r"(a)?(?(1)b|c)", "conditional"),
        (r"\bfoo", "word boundary"),
        ("a^b", "anchor"),
        ("a$b", "anchor"),
        ("(^a)*", "anchor"),
        ("a++", "possessive"),
        ("(?>a)", "atomic"),
        ("(", "not a regular expression"),
        ("(.{0,100},){20}", "states"),
        ("(a|b)*a(a|b){18}", "states"),
        ("a{100000000}", "states"),
    ],
)
def test_refusals_name_the_construct(pattern, construct):
    with pytest.raises(StructureError, match=construct):
        compile_node(parse_regex(pattern))
