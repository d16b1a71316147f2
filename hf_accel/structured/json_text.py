"""How JSON spells the characters of a string (RFC 8259): raw, by short escapes, by \\uXXXX.

A pattern or a length inside a string speaks of decoded characters; this maps sets of them to every spelling.
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_accel.structured.charset import ByteRange, CharSet

_SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_ESCAPED = CharSet.of([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])  # never raw
_HEX = ((0, 9, ord("0")), (10, 15, ord("A")), (10, 15, ord("a")))  # (first digit, last digit, its first byte)
_PLANE_END = 0xFFFF


def json_sequences(charset: CharSet) -> Iterator[tuple[ByteRange, ...]]:
    """Byte sequences of every spelling of the characters inside a JSON string."""
    yield from (charset - _ESCAPED).byte_sequences()
    backslash = (0x5C, 0x5C)
    for char, letter in _SHORT.items():
        if char in charset:
            yield backslash, (ord(letter), ord(letter))
    escape = (backslash, (ord("u"), ord("u")))
    for low, high in charset.ranges:
        if low <= _PLANE_END:
            for digits in _hex_sequences(low, min(high, _PLANE_END), 4):
                yield (*escape, *digits)
        if high > _PLANE_END:
            for lead, tail in _surrogates(max(low, _PLANE_END + 1), high):
                for first in _hex_sequences(*lead, 4):
                    for second in _hex_sequences(*tail, 4):
                        yield (*escape, *first, *escape, *second)


def _surrogates(low: int, high: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of lead and trail surrogates whose products are the code points of a range above U+FFFF."""
    for first, last in _blocks(low - 0x10000, high - 0x10000, 1 << 10):
        yield (0xD800 + (first >> 10), 0xD800 + (last >> 10)), (0xDC00 + (first & 0x3FF), 0xDC00 + (last & 0x3FF))


def _blocks(low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """The range cut so that each piece is inside one block of `size`, or whole blocks."""
    if low // size == high // size:
        yield low, high
        return
    first_whole, end_whole = -(-low // size) * size, (high + 1) // size * size
    if low < first_whole:
        yield low, first_whole - 1
    if first_whole < end_whole:
        yield first_whole, end_whole - 1
    if end_whole <= high:
        yield end_whole, high


def _hex_sequences(low: int, high: int, num_digits: int) -> Iterator[tuple[ByteRange, ...]]:
    """Spellings of a range of numbers in hexadecimal digits of either case."""
    if num_digits == 0:
        yield ()
        return
    size = 16 ** (num_digits - 1)
    for first, last in _blocks(low, high, size):
        rests = list(_hex_sequences(first % size, last % size, num_digits - 1))
        for digit_low, digit_high, byte in _HEX:
            start, end = max(first // size, digit_low), min(last // size, digit_high)
            if start <= end:
                for rest in rests:
                    yield (byte + start - digit_low, byte + end - digit_low), *rest
