"""Automata: minimal, trimmed, and closed under set operations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import NOTHING, Language, Repeat, Seq, text

PAIRS = [("a*b", "(ab|b)*"), ("[ab]{0,3}", "a.*"), (".*", "é+|a"), ("a", "b"), ("", "a?")]
TEXTS = ["".join(t).encode() for n in range(5) for t in itertools.product("abé", repeat=n)]


def dfa_of(pattern: str) -> ByteDfa:
    return compile_node(parse_regex(pattern))


def signature(dfa: ByteDfa) -> dict[int, frozenset[bytes]]:
    """What each state accepts, up to a length that tells the states of these small automata apart."""

    def suffixes(state: int) -> frozenset[bytes]:
        return frozenset(t for t in TEXTS if (after := dfa.walk(t, state)) != DEAD and dfa.accepting[after])

    return {state: suffixes(state) for state in range(dfa.num_states)}


@pytest.mark.parametrize("pattern", ["a*b", "(a|b)(a|b)", "(ab|b)*a?", "aab|bab|ab", "(aa|ab|ba|bb)*"])
def test_minimal_and_alive(pattern):
    dfa = dfa_of(pattern)
    languages = signature(dfa)
    assert len(set(languages.values())) == dfa.num_states, "two states accept the same"
    assert all(languages.values()), "a state leads nowhere"
    reached = {0} | set(np.unique(dfa.table)) - {DEAD}
    assert reached == set(range(dfa.num_states))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_set_operations(first, second):
    a, b = dfa_of(first), dfa_of(second)
    both, either, only_a = a & b, a | b, a - b
    for data in TEXTS:
        in_a, in_b = a.accepts(data), b.accepts(data)
        assert both.accepts(data) == (in_a and in_b)
        assert either.accepts(data) == (in_a or in_b)
        assert only_a.accepts(data) == (in_a and not in_b)


def test_nothing():
    nothing = compile_node(NOTHING)
    assert nothing.is_empty and nothing.num_states == 1
    assert not any(map(nothing.accepts, TEXTS))
    assert (dfa_of("a") & dfa_of("b")).is_empty and (dfa_of("a") - dfa_of("[ab]")).is_empty


def test_bytes_table_is_the_same_map():
    dfa = dfa_of("é+|[a-c]x")
    for state, byte in itertools.product(range(dfa.num_states), range(256)):
        assert dfa.bytes_table[state, byte] == dfa.walk(bytes([byte]), state)


def test_a_compiled_language_is_a_part_like_any_other():
    inner = dfa_of("(ab|c)+")
    embedded = compile_node(Seq((text("x"), Repeat(Language(inner.fragment), 0, 2), text("c"))))
    same = dfa_of("x((ab|c)+){0,2}c")
    assert (embedded - same).is_empty and (same - embedded).is_empty
    assert embedded.num_states == same.num_states
