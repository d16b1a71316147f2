"""Constraints over a vocabulary against brute force: masks on random prefixes, every segmentation, ends, dead ends."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import regex

from hf_accel.structured.automaton import compile_node
from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import DONE, TokenFsm, compile_fsm
from hf_accel.structured.vocabulary import Vocabulary

from .samples import random_text

EOS = (300, 302)
PATTERNS = [
    r"-?[0-9]+(\.[0-9]+)?",
    r"[a-z]+(, [a-z]+)*",
    ".*",
    r"(é|漢|ab)*c",
    "(yes|no|maybe)",
    r"(?s).{2,6}",
    "a{3}|a{5}",
]
WORDS = [
    "12.5",
    "12",
    "5",
    ".5",
    ", ",
    "apple",
    "pe",
    "ar",
    "ye",
    "yes",
    "es",
    "漢",
    "é",
    "ab",
    "abc",
    "aaa",
    "aa",
    "c",
    "  ",
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """All single bytes, parts of characters, some words twice, specials, unused and padded ids."""
    parts = ["漢".encode()[:2], "漢".encode()[1:], "é漢".encode()[1:], b"a\xc3"]
    tokens = [*(bytes([b]) for b in range(256)), *(w.encode() for w in WORDS), *parts, b"ab"]
    tokens += [None] * (320 - len(tokens))
    return Vocabulary(tuple(tokens), EOS)


def brute_force(pattern: str, vocabulary: Vocabulary, prefix: bytes) -> set[int]:
    """Tokens after which some text that matches can still come: complete characters by `regex`'s partial matching."""
    allowed = set()
    for token_id, token in enumerate(vocabulary.tokens):
        if token is not None and viable(pattern, prefix + token):
            allowed.add(token_id)
    if re.fullmatch(pattern, prefix.decode(errors="surrogateescape")):
        allowed |= set(EOS)
    return allowed


def viable(pattern: str, data: bytes) -> bool:
    for cut in range(min(4, len(data) + 1)):  # bytes of a character that is not complete
        try:
            text = data[: len(data) - cut].decode()
        except UnicodeDecodeError:
            continue
        rest = data[len(data) - cut :]
        if not rest:
            return regex.fullmatch(pattern, text, partial=True) is not None
        followers = (c for c in "éñ漢字😀\u0800\U0010ffff\u07ff\ud7ff" if c.encode().startswith(rest))
        return any(regex.fullmatch(pattern, text + c, partial=True) for c in followers)
    return False


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p not in (".*", r"(?s).{2,6}")])
def test_masks_equal_brute_force(pattern, vocabulary):
    fsm = compile_fsm(compile_node(parse_regex(pattern)), vocabulary)
    rng = random.Random(1)
    for _ in range(15):
        state, prefix = fsm.start, b""
        for _ in range(rng.randint(0, 5)):
            choices = [t for t in fsm.allowed(state).tolist() if t not in EOS]
            if not choices:
                break
            token_id = rng.choice(choices)
            state, prefix = fsm.advance(state, token_id)[0], prefix + vocabulary.tokens[token_id]
        assert set(fsm.allowed(state).tolist()) == brute_force(pattern, vocabulary, prefix), prefix


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_segmentation_is_accepted(pattern, vocabulary):
    dfa = compile_node(parse_regex(pattern))
    fsm, rng = compile_fsm(dfa, vocabulary), random.Random(2)
    by_bytes = {t: i for i, t in enumerate(vocabulary.tokens) if t is not None}
    for _ in range(40):
        text = random_text(dfa, rng, budget=8)
        state, at = fsm.start, 0
        while at < len(text):
            longest = max(n for n in range(1, len(text) - at + 1) if text[at : at + n] in by_bytes)
            size = rng.choice([n for n in range(1, longest + 1) if text[at : at + n] in by_bytes])
            state, _ = fsm.advance(state, by_bytes[text[at : at + size]])
            assert state != DEAD, (text, at)
            at += size
        assert all(fsm.advance(state, e)[0] == DONE for e in EOS)


def check_structure(fsm: TokenFsm, vocabulary: Vocabulary) -> None:
    """What holds for every constraint."""
    assert set(fsm.allowed(DONE).tolist()) == set(EOS)
    never = [i for i, t in enumerate(vocabulary.tokens) if t is None and i not in EOS]
    assert (fsm.table[:, fsm.classes[never]] == DEAD).all()
    for state in range(fsm.num_states):
        allowed = fsm.allowed(state)
        assert len(allowed), "a state without a way on"
        if not fsm.row_of[state, 1:].any():
            assert np.array_equal(allowed, np.flatnonzero(fsm.table[state, fsm.classes] != DEAD))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_structure(pattern, vocabulary):
    check_structure(compile_fsm(compile_node(parse_regex(pattern)), vocabulary), vocabulary)


def test_schema_outputs_decode_to_valid_json(vocabulary):
    dfa = compile_json_schema({"type": "object", "properties": {"é": {"type": "string"}}, "required": ["é"]})
    fsm, rng = compile_fsm(dfa, vocabulary), random.Random(3)
    check_structure(fsm, vocabulary)
    for _ in range(20):
        state, made = fsm.start, b""
        for _ in range(200):
            allowed = fsm.allowed(state).tolist()
            token_id = EOS[0] if EOS[0] in allowed else rng.choice(allowed)
            state, _ = fsm.advance(state, token_id)
            if token_id in EOS:
                assert state == DONE and dfa.accepts(made)
                break
            made += vocabulary.tokens[token_id]
            assert dfa.walk(made) != DEAD


COUNTED = [
    {"type": "string", "minLength": 3, "maxLength": 20},
    {"type": "string", "minLength": 18, "maxLength": 18},
    {"type": "array", "items": {"type": "string", "maxLength": 17}, "maxItems": 2},
    {"type": "object", "additionalProperties": {"type": "string", "minLength": 17, "maxLength": 65535}},
]


@pytest.mark.parametrize("schema", COUNTED)
def test_counting_allows_what_unrolling_allows(schema, vocabulary):
    """Every mask on random ways through both, up to the bounds; the long one against the byte automaton."""
    words = ('", "', '":"', '"}', 'a":"', "\\u00", "ééé", "aaaaaaaa", "aaaaaaaaaaaaaaaa", '""', '["', '"]', '{"')
    vocabulary = Vocabulary((*vocabulary.tokens[:280], *(w.encode() for w in words), *[None] * 28), EOS)
    counted_dfa = compile_json_schema(schema)
    counted = compile_fsm(counted_dfa, vocabulary)
    assert any(counted_dfa.counters) and counted.num_states < 80
    short = "65535" not in str(schema)
    unrolled = compile_fsm(compile_json_schema(schema, counting=False), vocabulary) if short else None
    rng = random.Random(4)
    for _ in range(25):
        at, other, made = (counted.start, 0), 1, b""
        for _ in range(60):
            allowed = counted.allowed(*at).tolist()
            assert allowed, "a state without a way on"
            if unrolled is not None:
                assert allowed == unrolled.allowed(other).tolist(), made
            choices = [t for t in allowed if t not in EOS and (short or len(vocabulary.tokens[t]) > 7)] or allowed
            token_id = rng.choice(choices)
            at = counted.advance(at[0], token_id, at[1])
            if token_id in EOS:
                assert counted_dfa.accepts(made)
                break
            made += vocabulary.tokens[token_id]
            state, count = counted_dfa.walk_counted(made, 0, 0)
            assert state != DEAD and (count == at[1] or counted_dfa.counters[state] is None), made
            if unrolled is not None:
                other = unrolled.advance(other, token_id)[0]


def test_dead_ends_of_the_vocabulary_are_pruned():
    tokens = (b"a", b"b", b"ax", None)  # x alone cannot be spelled
    fsm = compile_fsm(compile_node(parse_regex("a(b|xb)")), Vocabulary(tokens, (3,)))
    assert fsm.allowed(fsm.start).tolist() == [0, 2]
    fsm = compile_fsm(compile_node(parse_regex("a(b|yb)")), Vocabulary(tokens, (3,)))
    assert fsm.allowed(*fsm.advance(fsm.start, 0)).tolist() == [1]
    with pytest.raises(StructureError, match="no tokens"):
        compile_fsm(compile_node(parse_regex("y+")), Vocabulary(tokens, (3,)))


def test_equal_tokens_and_states_are_kept_once(vocabulary):
    fsm = compile_fsm(compile_node(parse_regex("[ab]{1,20}")), vocabulary)
    assert fsm.classes[ord("a")] == fsm.classes[ord("b")]
    assert len(fsm.masks) < fsm.num_states
    assert len(np.unique(fsm.masks, axis=0)) == len(fsm.masks)
    assert len(np.unique(fsm.table, axis=1).T) == fsm.table.shape[1]
