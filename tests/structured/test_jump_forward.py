"""Guesses are always legal, learn what is chosen, and are made at once where the text is forced."""

from __future__ import annotations

import random

import pytest

from hf_accel.structured.compiler import ConstraintCompiler
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.jump_forward import MAX_TRUST, GrammarMatcher, TokenPredictor
from hf_accel.structured.token_fsm import DONE
from hf_accel.structured.vocabulary import Vocabulary

EOS = 0
WORDS = [
    None,
    *(bytes([b]) for b in range(256)),
    b'{"',
    b"name",
    b'":',
    b'": "',
    b'"}',
    b"na",
    b"me",
    b'", "',
    b"age",
    b"ab",
    b"abc",
]
VOCABULARY = Vocabulary(tuple(WORDS), (EOS,))
IDS = {word: i for i, word in enumerate(WORDS) if word}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    Constraint.json_schema(SCHEMA, ""),
    Constraint.json_schema(SCHEMA),
    Constraint.regex("abcabcabc(x|yy)*"),
    Constraint.choice(["ab", "abc", "abcab"]),
]


@pytest.fixture(scope="module", params=CONSTRAINTS, ids=lambda c: c.value[:20])
def fsm(request):
    return ConstraintCompiler(VOCABULARY).compile(request.param)


def random_output(fsm, draws: random.Random) -> list[int]:
    state, count, found = fsm.start, 0, []
    while state != DONE and len(found) < 60:
        found.append(draws.choice(fsm.allowed(state, count).tolist()))
        state, count = fsm.advance(state, found[-1], count)
    return found


def test_the_matcher_follows_and_begins_again(fsm):
    draws, matcher = random.Random(), GrammarMatcher(fsm)
    for _ in range(20):
        output, state, count = random_output(fsm, draws), fsm.start, 0
        tokens, matcher = [7, 8], GrammarMatcher(fsm)
        while output:
            new = output[: draws.randint(1, 4)]
            del output[: len(new)]
            tokens += new
            for token_id in new:
                state, count = fsm.advance(state, token_id, count)
            assert matcher.follow(tokens, 2) == (state, count)
        assert matcher.follow(tokens[:3], 2) == fsm.advance(fsm.start, tokens[2], 0)


def test_what_is_proposed_is_legal_whatever_was_seen(fsm):
    draws, predictor, num_proposed = random.Random(), TokenPredictor(fsm, VOCABULARY), 0
    for _ in range(60):
        state, count = fsm.start, 0
        for token_id in random_output(fsm, draws):
            limit, at = draws.randint(1, 9), (state, count)
            proposed = predictor.propose(*at, limit)
            assert len(proposed) <= limit
            for guess, *after in proposed:
                assert guess != EOS and guess in fsm.allowed(*at).tolist()
                at = fsm.advance(at[0], guess, at[1])
                assert at == tuple(after)
            num_proposed += len(proposed)
            predictor.observe(state, count, token_id)
            state, count = fsm.advance(state, token_id, count)
    assert num_proposed > 0


def test_allows_agrees_with_allowed(fsm):
    draws = random.Random()
    for _ in range(20):
        state, count = fsm.start, 0
        for token_id in random_output(fsm, draws):
            allowed = set(fsm.allowed(state, count).tolist())
            assert {i for i in range(len(WORDS)) if fsm.allows(state, i, count)} == allowed
            state, count = fsm.advance(state, token_id, count)


def test_forced_text_is_guessed_in_its_longest_tokens_at_once():
    fsm = ConstraintCompiler(VOCABULARY).compile(CONSTRAINTS[0])
    guesses = [WORDS[token_id] for token_id, _, _ in TokenPredictor(fsm, VOCABULARY).propose(fsm.start, 0, 16)]
    assert guesses == [b'{"', b"name", b'":', b'"']  # after it anything may stand, also in one token with the quote


def test_other_spellings_are_learnt_and_forgotten():
    fsm = ConstraintCompiler(VOCABULARY).compile(CONSTRAINTS[0])
    predictor = TokenPredictor(fsm, VOCABULARY)
    inside, _ = fsm.advance(fsm.start, IDS[b'{"'])

    def guess() -> bytes | None:
        found = predictor.propose(inside, 0, 1)
        return WORDS[found[0][0]] if found else None

    assert guess() == b"name"
    predictor.observe(inside, 0, IDS[b"na"])
    assert guess() is None
    predictor.observe(inside, 0, IDS[b"na"])
    assert guess() == b"na"
    for _ in range(2 * MAX_TRUST):
        predictor.observe(inside, 0, IDS[b"na"])
    predictor.observe(inside, 0, IDS[b"n"])
    assert guess() == b"na"  # one exception is forgiven
    predictor.observe(inside, 0, IDS[b"n"])
    predictor.observe(inside, 0, IDS[b"n"])
    assert guess() == b"n"


def test_an_end_is_never_guessed():
    fsm = ConstraintCompiler(VOCABULARY).compile(CONSTRAINTS[3])
    predictor = TokenPredictor(fsm, VOCABULARY)
    state, _ = fsm.advance(fsm.start, IDS[b"ab"])
    for _ in range(5):
        predictor.observe(state, 0, EOS)
    assert all(token_id != EOS for token_id, _, _ in predictor.propose(state, 0, 9))
