"""GBNF becomes Lark's notation with the same texts, or is refused with its line."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import regex

from hf_accel.structured.constraint import Constraint
from hf_accel.structured.gbnf import is_gbnf, to_lark
from hf_accel.structured.syntax import StructureError

from .grammars import ARITHMETIC, ARITHMETIC_GBNF, accepts, allowed, byte_vocabulary, compiled

AS_REGEX = [
    (r'root ::= "a" | "b" root', r"b*a"),
    (r'root ::= ("a" "b"?)+', r"(ab?)+"),
    (r'root ::= "a"{2} [bc]{1,2}' + "\n", r"a{2}[bc]{1,2}"),
    (r'root ::= "a"{2,} | ""', r"(a{2,})?"),
    ('root ::= x-1 "c" # comment "\nx-1 ::= |\n  [^ab] | "b"', r"(b|[^ab])?c"),
    ("start ::= [a-b-] . 'c'*", r"[ab-](?s:.)c*"),
    (r'root ::= [\x61\u0062] "\x2d\"" | "\\" "\]"', r'[ab]-"|\\\]'),
    (r'root ::= "a" "bc" | "ab" "a"', r"abc|aba"),
    (r'root ::= [a-b]+ "ab" | "ab"', r"[ab]*ab"),
    (r'root ::= [a-z] "b" | "a" "c" | ""', r"([a-z]b|ac)?"),
    ('root ::= "\\n" | "é中" "😀"+', "\n|é中😀+"),
    ('root ::= ( ("a") | ("b" "c")* )?', r"a|(bc)*"),
]


@pytest.mark.parametrize(("grammar", "pattern"), AS_REGEX)
def test_texts_are_those_of_an_equal_regex(grammar, pattern):
    pytest.importorskip("llguidance")
    found = compiled(Constraint.grammar(grammar))
    alphabet = 'abc-\\"]\n'
    special = ["é中", "é中😀😀", "中", "é中😀"]
    texts = ["".join(t) for n in range(5) for t in itertools.product(alphabet if n < 3 else "abc", repeat=n)]
    texts += special
    taken = [t for t in texts if accepts(found, t)]
    assert taken == [t for t in texts if re.fullmatch(pattern, t)] and taken


def random_grammar(rng: random.Random, depth: int = 3) -> tuple[str, str]:
    """(GBNF, regex) of the same texts over a and b."""
    kind = rng.randrange(7 if depth else 3)
    if kind < 3:
        return rng.choice([('"a"', "a"), ('"ab"', "ab"), ("[ab]", "[ab]"), ('"bb"', "bb"), ('""', "")])
    first, second = random_grammar(rng, depth - 1), random_grammar(rng, depth - 1)
    if kind == 3:
        mark = rng.choice(["*", "+", "?", "{2}", "{1,2}", "{2,}"])
        return f"({first[0]}){mark}", f"(?:{first[1]}){mark}"
    if kind == 4:
        return f"({first[0]} | {second[0]})", f"(?:{first[1]}|{second[1]})"
    return f"{first[0]} {second[0]}", first[1] + second[1]


def test_random_grammars_equal_random_regexes_text_by_text_and_mask_by_mask():
    pytest.importorskip("llguidance")
    rng = random.Random(2)
    texts = ["".join(t) for n in range(6) for t in itertools.product("ab", repeat=n)]
    spelled = [b"a", b"b", b"ab", b"ba", b"bba", b"abab"]
    vocabulary = byte_vocabulary(*spelled[2:])
    for _ in range(60):
        grammar, pattern = random_grammar(rng)
        found = compiled(Constraint.grammar(f"root ::= {grammar}"), vocabulary)
        right = [t for t in texts if re.fullmatch(pattern, t)]
        assert [t for t in texts if accepts(found, t)] == right, grammar
        for text in rng.sample(right, min(len(right), 3)):
            text = text[: rng.randrange(len(text) + 1)]
            matcher = found.matcher()
            matcher.move_to(list(text.encode()))
            tokens = {i: t.decode() for i, t in enumerate(vocabulary.tokens) if t in spelled}
            viable = {i for i, t in tokens.items() if regex.fullmatch(pattern, text + t, partial=True)}
            assert allowed(matcher) - set(vocabulary.eos_token_ids) == viable, (grammar, text)


def test_notations_are_told_apart():
    assert is_gbnf(ARITHMETIC_GBNF) and not is_gbnf(ARITHMETIC)
    assert not is_gbnf('start: "x ::= y"')


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("root ::= foo", "line 1 names the rule 'foo'"),
        ('root ::= "a"\n\nroot ::= "b"', "line 3: the rule 'root' is there twice"),
        ('x ::= "a"', "no rule named root"),
        ('root ::= "a" %', "line 1: '%' is no part of GBNF"),
        ('root ::= ("a"', "a . is missing"),
        ('root ::= "a")', "too many"),
        ("root ::= * x", "nothing stands before"),
        (r'root ::= "\q"', r"escape .q is not known"),
        (r'root ::= "\ud800"', "no character"),
        ('root ::= "a" ;', "no part of GBNF"),
        ("foo root ::= x", "begins with its name"),
    ],
)
def test_what_is_no_gbnf_is_refused_with_its_line(grammar, message):
    with pytest.raises(StructureError, match=message):
        to_lark(grammar)
