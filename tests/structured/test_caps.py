"""What would take too much time or memory is refused, with a remedy, before it does."""

from __future__ import annotations

import time

import pytest

from hf_accel.structured import token_fsm
from hf_accel.structured.automaton import compile_node
from hf_accel.structured.compiler import ConstraintCompiler
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import StructureError, TooLarge
from hf_accel.structured.time_limit import check_time, time_limit
from hf_accel.structured.token_fsm import compile_fsm
from hf_accel.structured.vocabulary import Vocabulary

VOCABULARY = Vocabulary((*(bytes([b]) for b in range(256)), None), (256,))
REFUSED = [
    "(a|b)*a(a|b){18}",
    "(x{1000}){1000}",
    "(" * 5000 + "a" + ")" * 5000,
    "((a{0,99}){0,99}){0,99}",
]


@pytest.mark.parametrize("pattern", REFUSED)
def test_explosions_are_refused(pattern):
    with pytest.raises(StructureError, match=r"smaller bounds|too large"):
        Constraint.regex(pattern).compile()


def test_long_texts_are_counted():
    fsm = ConstraintCompiler(VOCABULARY).compile(Constraint.json_schema({"type": "string", "maxLength": 65535}))
    assert fsm.num_bytes < 1 << 20


@pytest.mark.parametrize(
    "constraint",
    [Constraint.regex("(a|b)*a(a|b){12}"), Constraint.choice([f"{i * 7919 % 10007}" for i in range(10_000)])],
    ids=["regex", "choice"],
)
def test_the_time_of_a_compilation_is_limited(constraint):
    compiler = ConstraintCompiler(VOCABULARY, max_seconds=0.01)
    start = time.process_time()
    with pytest.raises(TooLarge, match=r"more than 0\.01 s"):
        compiler.compile(constraint)
    assert time.process_time() - start < 2
    assert compiler.compile(Constraint.regex("a")).num_states == 3, "the next one has its own time"


def test_time_is_limited_inside_only():
    check_time()
    with time_limit(0.0), pytest.raises(TooLarge):
        check_time()
    check_time()


def test_memory_of_an_automaton_is_limited(monkeypatch):
    monkeypatch.setattr(token_fsm, "MAX_BYTES", 280)
    with pytest.raises(TooLarge, match="12 states for 3 kinds"):
        compile_fsm(compile_node(parse_regex("[ab]{10}")), Vocabulary((b"a", b"b", None), (2,)))
    with pytest.raises(TooLarge, match="3 masks of 1257 tokens"):
        compile_fsm(compile_node(parse_regex("ab")), Vocabulary((*VOCABULARY.tokens, *[None] * 1000), (256,)))
    monkeypatch.setattr(token_fsm, "MAX_BYTES", 500)
    compile_fsm(compile_node(parse_regex("ab")), Vocabulary((*VOCABULARY.tokens, *[None] * 1000), (256,)))
