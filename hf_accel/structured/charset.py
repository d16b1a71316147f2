"""Sets of Unicode code points, and the byte sequences that spell them in UTF-8.

Owns interval arithmetic over code points. Surrogates (U+D800 to U+DFFF) have no UTF-8 form and are never members.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LAST_CODE_POINT = 0x10FFFF
ByteRange = tuple[int, int]

_SURROGATES = (0xD800, 0xDFFF)
_LENGTH_ENDS = (0x7F, 0x7FF, 0xFFFF, LAST_CODE_POINT)  # last code point of 1, 2, 3 and 4 bytes


@dataclass(frozen=True)
class CharSet:
    """Code points as sorted, disjoint, non-adjacent inclusive ranges."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> CharSet:
        """The union of inclusive ranges, in any order, without surrogates."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], high))
            elif low <= high:
                merged.append((low, high))
        return cls(tuple(_without_surrogates(merged)))

    @classmethod
    def of_chars(cls, chars: str) -> CharSet:
        """The characters of a string."""
        return cls.of((ord(c), ord(c)) for c in chars)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __contains__(self, char: str) -> bool:
        return any(low <= ord(char) <= high for low, high in self.ranges)

    def __len__(self) -> int:
        return sum(high - low + 1 for low, high in self.ranges)

    def __or__(self, other: CharSet) -> CharSet:
        return CharSet.of([*self.ranges, *other.ranges])

    def __and__(self, other: CharSet) -> CharSet:
        return ~(~self | ~other)

    def __sub__(self, other: CharSet) -> CharSet:
        return self & ~other

    def __invert__(self) -> CharSet:
        gaps, next_low = [], 0
        for low, high in self.ranges:
            gaps.append((next_low, low - 1))
            next_low = high + 1
        gaps.append((next_low, LAST_CODE_POINT))
        return CharSet.of(gap for gap in gaps if gap[0] <= gap[1])

    def byte_sequences(self) -> Iterator[tuple[ByteRange, ...]]:
        """The UTF-8 spellings, as sequences of inclusive byte ranges whose products are disjoint."""
        for low, high in self.ranges:
            start = low
            for end in _LENGTH_ENDS:
                if start <= min(high, end):
                    yield from _sequences(start, min(high, end))
                start = max(start, end + 1)


def _without_surrogates(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    first, last = _SURROGATES
    for low, high in ranges:
        if low < first:
            yield low, min(high, first - 1)
        if high > last:
            yield max(low, last + 1), high


def _sequences(low: int, high: int) -> Iterator[tuple[ByteRange, ...]]:
    """Spellings of a range whose code points all take the same number of bytes.

    A block of code points that shares everything but its last n continuation bytes, and has all of these, is one sequence.
    """
    for num_free in (3, 2, 1):  # continuation bytes, the largest blocks first
        size = 1 << 6 * num_free
        if low // size == high // size:
            continue
        first_whole, end_whole = -(-low // size) * size, (high + 1) // size * size
        if low < first_whole:
            yield from _sequences(low, first_whole - 1)
        if first_whole < end_whole:
            yield _product(first_whole, end_whole - 1)
        if end_whole <= high:
            yield from _sequences(end_whole, high)
        return
    yield _product(low, high)


def _product(low: int, high: int) -> tuple[ByteRange, ...]:
    return tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


ANY_CHAR = ~CharSet(())
