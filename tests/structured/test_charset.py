"""Sets of code points against Python's own sets, and their UTF-8 spellings against `str.encode`."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_accel.structured.charset import ANY_CHAR, LAST_CODE_POINT, CharSet

EDGES = [0, 0x7F, 0x7FF, 0xD7FF, 0xE000, 0xFFFF, LAST_CODE_POINT]
POINTS = st.one_of(
    st.integers(0, LAST_CODE_POINT),
    st.builds(lambda e, d: min(max(e + d, 0), LAST_CODE_POINT), st.sampled_from(EDGES), st.integers(-70, 70)),
)
RANGES = st.lists(
    st.builds(lambda low, n: (low, min(low + n, LAST_CODE_POINT)), POINTS, st.integers(0, 300)), max_size=4
)


def members(ranges) -> set[int]:
    return {c for low, high in ranges for c in range(low, high + 1) if not 0xD800 <= c <= 0xDFFF}


@given(RANGES, RANGES)
@settings(max_examples=80, deadline=None)
def test_set_operations(first, second):
    a, b = CharSet.of(first), CharSet.of(second)
    assert members(a.ranges) == members(first)
    assert members((a | b).ranges) == members(first) | members(second)
    assert members((a & b).ranges) == members(first) & members(second)
    assert members((a - b).ranges) == members(first) - members(second)
    assert len(~a) == len(ANY_CHAR) - len(a) and ~~a == a
    assert all(low > before + 1 for (_, before), (low, _) in itertools.pairwise(a.ranges))


@given(RANGES)
@settings(max_examples=40, deadline=None)
def test_spellings_are_utf8_and_disjoint(ranges):
    spelled = [
        bytes(choice)
        for sequence in CharSet.of(ranges).byte_sequences()
        for choice in itertools.product(*(range(low, high + 1) for low, high in sequence))
    ]
    assert len(spelled) == len(set(spelled))
    assert set(spelled) == {chr(c).encode() for c in members(ranges)}


def test_everything_has_the_nine_forms_of_the_standard():
    assert len(list(ANY_CHAR.byte_sequences())) == 9  # Unicode 3.9, table 3-7
    assert len(ANY_CHAR) == 0x110000 - 0x800
