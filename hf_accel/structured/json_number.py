"""JSON numbers as syntax trees: integers and decimals within bounds.

Within bounds numbers are written without an exponent. Bounds are compared as `json` and `jsonschema` do, which parse to
float64: where a bound is exclusive, fractions are kept short enough that no text above it rounds to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.charset import CharSet
from hf_accel.structured.syntax import EMPTY, NOTHING, Alt, Chars, Node, Repeat, Seq, StructureError, text

_MAX_FRACTION = 15

DIGIT = Chars(CharSet.of_chars("0123456789"))
DIGITS = Repeat(DIGIT, 0, None)
NATURAL = Alt((text("0"), Seq((Chars(CharSet.of_chars("123456789")), DIGITS))))
INTEGER = Seq((Repeat(text("-"), 0, 1), NATURAL))
EXPONENT = Seq((Chars(CharSet.of_chars("eE")), Repeat(Chars(CharSet.of_chars("+-")), 0, 1), Repeat(DIGIT, 1, None)))
FRACTION = Seq((text("."), Repeat(DIGIT, 1, None)))
_SHORT_INTEGER = Seq(
    (Repeat(text("-"), 0, 1), Alt((text("0"), Seq((Chars(CharSet.of_chars("123456789")), Repeat(DIGIT, 0, 7))))))
)
_SHORT_FRACTION = Seq((text("."), Repeat(DIGIT, 1, 7)))
NUMBER = Seq((INTEGER, Repeat(FRACTION, 0, 1), Repeat(EXPONENT, 0, 1)))


@dataclass(frozen=True)
class Bound:
    """A limit of a range; `exclusive`: the limit itself is outside."""

    value: Decimal
    exclusive: bool = False


def integer_dfa(low: Bound | None, high: Bound | None) -> ByteDfa:
    """Integers within bounds, in their plain decimal form."""
    least = None if low is None else _integer_from(low)
    most = None if high is None else -_integer_from(Bound(-high.value, high.exclusive))
    return compile_node(INTEGER if least is None and most is None else _integers(least, most))


def short_decimals_dfa() -> ByteDfa:
    """Numbers of so few digits that a float64 tells each from the others."""
    return compile_node(Seq((_SHORT_INTEGER, Repeat(_SHORT_FRACTION, 0, 1))))


def fractions_dfa() -> ByteDfa:
    """Numbers that are no integers, of few digits."""
    zeros = Seq((text("."), Repeat(text("0"), 1, None)))
    return compile_node(Seq((_SHORT_INTEGER, _SHORT_FRACTION))) - compile_node(Seq((INTEGER, zeros)))


def number_dfa(low: Bound | None, high: Bound | None) -> ByteDfa:
    """Numbers within bounds; without any, every form that JSON has."""
    if low is None and high is None:
        return compile_node(NUMBER)
    longest = _longest_fraction([b for b in (low, high) if b is not None and b.exclusive])
    fraction = Seq((text("."), Repeat(DIGIT, 1, longest)))
    dfa = compile_node(Seq((INTEGER, Repeat(fraction, 0, 1))))
    if low is not None:
        dfa &= compile_node(_above(low))
    if high is not None:
        dfa &= compile_node(_negated(Bound(-high.value, high.exclusive)))
    return dfa


def _integer_from(low: Bound) -> int:
    """The least integer that a lower bound lets through."""
    least = math.ceil(low.value)
    return least + 1 if low.exclusive and least == low.value else least


def _longest_fraction(exclusive: list[Bound]) -> int | None:
    """Digits of a fraction that keep every number other than a bound further than rounding from it."""
    if not exclusive:
        return None
    digits = [min(_MAX_FRACTION, -math.ceil(math.log10(math.ulp(float(b.value))))) for b in exclusive]
    needed = [len(_parts(abs(b.value))[1]) for b in exclusive]
    if min(digits) < max(needed):
        raise StructureError("an exclusive bound has more digits than a float64 can tell apart: use an inclusive one")
    return max(1, min(digits))


# ---- integers ------------------------------------------------------------------------------------------------------


def _integers(least: int | None, most: int | None) -> Node:
    if least is not None and most is not None and least > most:
        return NOTHING
    parts: list[Node] = []
    if most is None or most >= 0:
        parts.append(_naturals(max(least or 0, 0), most))
    if least is None or least < 0:
        parts.append(
            Seq((text("-"), _naturals(max(1, -most if most is not None else 1), None if least is None else -least)))
        )
    return Alt(tuple(parts))


def _naturals(low: int, high: int | None) -> Node:
    """Integers from low to high, both at least 0."""
    parts: list[Node] = []
    if high is None:
        length = len(str(low))
        parts.append(Seq((Chars(CharSet.of_chars("123456789")), Repeat(DIGIT, length, None))))
        high = 10**length - 1
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        parts.append(_same_length(str(first), str(last)))
    return Alt(tuple(parts))


def _same_length(low: str, high: str) -> Node:
    """Digit strings of one length between two."""
    if not low:
        return EMPTY
    if not low.strip("0") and not high.strip("9"):
        return Repeat(DIGIT, len(low), len(low))
    if low[0] == high[0]:
        return Seq((text(low[0]), _same_length(low[1:], high[1:])))
    rest = len(low) - 1
    parts = [
        Seq((text(low[0]), _same_length(low[1:], "9" * rest))),
        Seq((text(high[0]), _same_length("0" * rest, high[1:]))),
    ]
    if int(high[0]) - int(low[0]) > 1:
        between = Chars(CharSet.of([(ord(low[0]) + 1, ord(high[0]) - 1)]))
        parts.append(Seq((between, Repeat(DIGIT, rest, rest))))
    return Alt(tuple(parts))


# ---- decimals ------------------------------------------------------------------------------------------------------


def _parts(value: Decimal) -> tuple[int, str]:
    """Integer part and digits of the fraction, without zeros at its end, of a number at least 0."""
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _above(low: Bound) -> Node:
    """Decimals from a lower bound on."""
    if low.value > 0 or (low.value == 0 and low.exclusive):
        return _magnitude_above(abs(low.value), low.exclusive)
    any_fraction = Repeat(FRACTION, 0, 1)
    not_negative = Seq((NATURAL, any_fraction))
    if low.value == 0:
        zero = Seq((text("-0"), Repeat(Seq((text("."), Repeat(text("0"), 1, None))), 0, 1)))
        return Alt((not_negative, zero))
    return Alt((not_negative, Seq((text("-"), _magnitude_below(-low.value, low.exclusive)))))


def _negated(low: Bound) -> Node:
    """Decimals whose negation is above a lower bound, that is, decimals up to an upper one."""
    if low.value > 0 or (low.value == 0 and low.exclusive):
        return Seq((text("-"), _magnitude_above(abs(low.value), low.exclusive)))
    negative = Seq((text("-"), NATURAL, Repeat(FRACTION, 0, 1)))
    if low.value == 0:
        return Alt((negative, Seq((text("0"), Repeat(Seq((text("."), Repeat(text("0"), 1, None))), 0, 1)))))
    return Alt((negative, _magnitude_below(-low.value, low.exclusive)))


def _magnitude_above(value: Decimal, exclusive: bool) -> Node:
    whole, fraction = _parts(value)
    same = Seq((_naturals(whole, whole), _fraction_above(fraction, exclusive)))
    return Alt((Seq((_naturals(whole + 1, None), Repeat(FRACTION, 0, 1))), same))


def _magnitude_below(value: Decimal, exclusive: bool) -> Node:
    whole, fraction = _parts(value)
    parts = [Seq((_naturals(whole, whole), _fraction_below(fraction, exclusive)))]
    if whole > 0:
        parts.append(Seq((_naturals(0, whole - 1), Repeat(FRACTION, 0, 1))))
    return Alt(tuple(parts))


def _fraction_above(fraction: str, exclusive: bool) -> Node:
    """Fractions, with their point, of at least these digits; none counts as 0."""
    if not fraction and not exclusive:
        return Repeat(FRACTION, 0, 1)
    rest: Node = DIGITS if not exclusive else Seq((DIGITS, Chars(CharSet.of_chars("123456789")), DIGITS))
    for digit in reversed(fraction):
        larger = Chars(CharSet.of([(ord(digit) + 1, ord("9"))])) if digit != "9" else None
        same = Seq((text(digit), rest))
        rest = same if larger is None else Alt((same, Seq((larger, DIGITS))))
    return Seq((text("."), rest))


def _fraction_below(fraction: str, exclusive: bool) -> Node:
    """Fractions, with their point, of at most these digits; none counts as 0."""
    zeros = Repeat(text("0"), 0, None)
    if not fraction:
        return NOTHING if exclusive else Repeat(Seq((text("."), Repeat(text("0"), 1, None))), 0, 1)
    rest: Node = NOTHING if exclusive else zeros
    for index, digit in reversed(list(enumerate(fraction))):
        smaller = Chars(CharSet.of([(ord("0"), ord(digit) - 1)])) if digit != "0" else None
        parts: list[Node] = [Seq((text(digit), rest))]
        if smaller is not None:
            parts.append(Seq((smaller, DIGITS)))
        if index > 0:
            parts.append(EMPTY)  # the fraction ends before: it is smaller, as these digits end in no zero
        rest = Alt(tuple(parts))
    return Alt((EMPTY, Seq((text("."), rest))))
