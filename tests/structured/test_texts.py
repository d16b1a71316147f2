"""Sets of texts: minimal as the general construction makes them, whatever their number."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hf_accel.structured.automaton import ByteDfa, compile_node, compile_texts
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import Alt, Chars, Seq, StructureError, TooLarge, text
from hf_accel.structured.texts import shared_texts


def same(a: ByteDfa, b: ByteDfa) -> bool:
    return a.num_states == b.num_states and (a - b).is_empty and (b - a).is_empty


@pytest.mark.parametrize("letters", ["ab", "abcé漢"])
@pytest.mark.parametrize("number", [1, 7, 60])
def test_texts_equal_alternatives_one_by_one(letters, number):
    rng = random.Random()
    words = ["".join(rng.choices(letters, k=rng.randint(0, 6))) for _ in range(number)]
    made = compile_texts(w.encode() for w in words)
    expected = compile_node(Alt(()))
    for word in words:
        expected = expected | compile_node(text(word))
    assert same(made, expected), words
    assert same(compile_node(Alt(tuple(map(text, words)))), expected), words
    assert len({(row.tobytes(), bool(a)) for row, a in zip(made.table, made.accepting, strict=True)}) == made.num_states


def test_alternatives_that_are_more_than_texts_are_kept_whole():
    words = [f"word{i}" for i in range(20)]
    pattern = "|".join([*words, "x+", "[ab]c"])
    dfa = compile_node(parse_regex(pattern))
    assert all(dfa.accepts(w.encode()) for w in [*words, "xxx", "ac", "bc"])
    assert not any(dfa.accepts(w.encode()) for w in ("word", "word20", "c", "xw", ""))
    nested = Alt((*map(text, words), Seq((Alt((text("p"), text("q"))), text("r"))), Chars(parse_regex("[yz]").charset)))
    made = compile_node(nested)
    assert all(made.accepts(w.encode()) for w in [*words, "pr", "qr", "y", "z"])
    assert not any(made.accepts(w.encode()) for w in ("p", "r", "x"))


def test_many_texts_compile_and_too_many_states_are_refused():
    names = [f"item_{i:05d}" for i in range(4000)]
    assert Constraint.choice(names).compile().num_states < 20
    assert Constraint.json_schema({"enum": names}).compile().accepts(b'"item_03999"')
    rng = np.random.default_rng(0)
    words = [bytes(word) for word in rng.integers(97, 113, size=(2000, 9), dtype=np.uint8)]
    with pytest.raises(TooLarge, match="fewer or shorter"):
        shared_texts(words, 3000)
    with pytest.raises(StructureError, match="no text"):
        Constraint.choice(["a", "\ud800"]).compile()
