"""The walk of all tokens from all states against one that takes a token, a state and a byte at a time."""

from __future__ import annotations

import random

import pytest

from hf_accel.structured import token_walk
from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import TooLarge
from hf_accel.structured.token_walk import NEVER, walk_tokens
from hf_accel.structured.vocabulary import TokenTrie

Move = tuple[int, bool, int, int]


def follow(dfa: ByteDfa, origin: int, token: bytes) -> tuple[int, Move] | None:
    """(target, (value, sets, need, leaves)) as `Moves` has them; None where no count allows the token."""
    state, count, left, leaves = origin, 0, dfa.counters[origin] is None, NEVER
    need = 0
    for byte in token:
        was, state = dfa.counters[state], int(dfa.bytes_table[state, byte])
        if state == DEAD:
            return None
        now = dfa.counters[state]
        if was is not None and now is None:
            if not left:
                leaves = need = count
            elif count < was.low:
                return None
            left, count = True, 0
        elif now is not None:
            count = 0 if was is None else count + now.home
            if left and count + (not now.home) > now.high:
                return None
            if not left:
                need = max(need, count + (not now.home))
    first = dfa.counters[origin]
    if first is not None and need > first.high:
        return None
    return state, (count, left, need, leaves)


def dfas() -> dict[str, ByteDfa]:
    strings = {"type": "array", "items": {"type": "string", "minLength": 17, "maxLength": 40}, "maxItems": 3}
    bounded = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 17}, "b": {"type": "number"}}}
    made = {p: compile_node(parse_regex(p)) for p in (r"(é|漢|ab)*c", r"-?[0-9]+(\.[0-9]+)?", "[ab]{3,9}|b+", "x")}
    return made | {"strings": compile_json_schema(strings), "bounded": compile_json_schema(bounded)}


@pytest.mark.parametrize("name", dfas())
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_moves_equal_those_of_single_tokens(name, chunk, monkeypatch):
    monkeypatch.setattr(token_walk, "CHUNK", chunk)
    dfa, rng = dfas()[name], random.Random()
    alphabet = [*'ab"\\u0[],:x1.-{}', "é", "漢", "abab", '", "', "aaaaaaaa"]
    words = {"".join(rng.choices(alphabet, k=rng.randint(1, 5))).encode() for _ in range(150)}
    words |= {"漢".encode()[:2], "é漢".encode()[1:], b"a" * 41, *(bytes([b]) for b in range(0, 256, 3))}
    tokens = [None, *rng.sample(sorted(words), len(words)), b"ab", b"ab", None]
    moves = walk_tokens(dfa, TokenTrie(tokens))
    columns: dict[int, list[tuple[int, int, Move]]] = {}
    names = ("column", "state", "target", "value", "sets", "need", "leaves")
    for column, state, target, *move in zip(*(getattr(moves, n).tolist() for n in names), strict=True):
        columns.setdefault(column, []).append((state, target, tuple(move)))
    found = {t: columns[c] for t, c in zip(moves.token.tolist(), moves.column_of.tolist(), strict=True)}
    assert len({str(entries) for entries in columns.values()}) == len(columns), "a column is there twice"
    for token_id, token in enumerate(tokens):
        every = [(s, follow(dfa, s, token)) for s in range(dfa.num_states)] if token else []
        expected = [(s, move[0], move[1]) for s, move in every if move is not None]
        assert found.get(token_id, []) == expected, token


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(token_walk, "MAX_ENTRIES", 30)
    with pytest.raises(TooLarge, match="memory"):
        walk_tokens(compile_node(parse_regex("[a-z]{20}")), TokenTrie([bytes([b]) for b in range(97, 123)]))
