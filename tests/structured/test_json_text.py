"""Spellings of characters inside JSON strings: all of them, each decoded by `json` to the character it spells."""

from __future__ import annotations

import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_accel.structured.automaton import compile_node
from hf_accel.structured.charset import ANY_CHAR, LAST_CODE_POINT, CharSet
from hf_accel.structured.json_text import json_sequences
from hf_accel.structured.syntax import Chars, Repeat

SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
STARTS = st.sampled_from([0, 0x1E, 0x5A, 0x7F, 0x7FA, 0xD7F0, 0xDFF0, 0xFFF0, 0x103F8, LAST_CODE_POINT - 20])


def spellings(char: str) -> set[bytes]:
    """Every way to write a character, by the RFC's grammar."""
    found = {char.encode()} if ord(char) >= 0x20 and char not in '"\\' else set()
    if char in SHORT:
        found.add(f"\\{SHORT[char]}".encode())
    units = [f"{(b[0] << 8) + b[1]:04x}" for b in zip(*[iter(char.encode("utf-16-be"))] * 2, strict=True)]
    digits = [{d.lower(), d.upper()} for unit in units for d in unit]
    for choice in itertools.product(*digits):
        text = "".join(choice)
        found.add("".join(f"\\u{text[i : i + 4]}" for i in range(0, len(text), 4)).encode())
    return found


@given(STARTS, st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_every_spelling_once(start, count):
    charset = CharSet.of([(start, start + count)])
    made = [
        bytes(choice)
        for sequence in json_sequences(charset)
        for choice in itertools.product(*(range(low, high + 1) for low, high in sequence))
    ]
    chars = [chr(c) for low, high in charset.ranges for c in range(low, high + 1)]
    assert len(made) == len(set(made))
    assert set(made) == set().union(*map(spellings, chars))


@given(st.text(max_size=4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_lengths_count_decoded_characters(value, ascii_only):
    dfa = compile_node(Repeat(Chars(ANY_CHAR), 0, 3), spell=json_sequences)
    assert dfa.accepts(json.dumps(value, ensure_ascii=ascii_only).encode()[1:-1]) == (len(value) <= 3)


def test_lone_surrogates_and_bad_escapes_are_no_text():
    dfa = compile_node(Repeat(Chars(ANY_CHAR), 0, None), spell=json_sequences)
    for wrong in (rb"\ud800", rb"\udc00\ud800", rb"\x41", b"\\", rb"\u12", b'"', b"\n", b"\xff"):
        assert not dfa.accepts(wrong)
    assert dfa.accepts(rb"\uD83D\ude00\/")
