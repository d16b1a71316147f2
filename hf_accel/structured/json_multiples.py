"""`multipleOf` as automata of remainders over plain decimals, exact: of what is written, not of what a float64 makes of it."""

from __future__ import annotations

from decimal import Decimal

from hf_accel.structured.automaton import ByteDfa, compile_node, minimal_of_rows
from hf_accel.structured.json_number import INTEGER, short_decimals_dfa
from hf_accel.structured.syntax import StructureError

MAX_REMAINDERS = 10_000


def multiples_dfa(divisor: float) -> ByteDfa:
    """Numbers without an exponent that are multiples, integers where the divisor is one.

    Raises:
        StructureError: the divisor has too many digits.
    """
    number, places = _ratio(divisor)
    return _Remainders(number, places).dfa()


def no_multiples_dfa(divisor: float, integers: bool) -> ByteDfa:
    """Integers, or numbers of few digits, that are no multiples."""
    number, places = _ratio(divisor)
    return (compile_node(INTEGER) if integers else short_decimals_dfa()) - _Remainders(number, places, zeros=True).dfa()


def _ratio(divisor: float) -> tuple[int, int]:
    """(n, k) where the divisor is n / 10**k, in lowest terms."""
    value, places = Decimal(repr(divisor)), 0
    while value != int(value):
        value, places = value * 10, places + 1
    if int(value) * (places + 1) > MAX_REMAINDERS:
        raise StructureError(f"multipleOf {divisor!r} has too many digits: use one of fewer (at most {MAX_REMAINDERS})")
    return int(value), places


class _Remainders:
    """A state for each remainder after each number of places.

    Args:
        number, places: the divisor is number / 10**places.
        zeros: let fractions go on with zeros, so that every spelling of a multiple is accepted.
    """

    def __init__(self, number: int, places: int, zeros: bool = False) -> None:
        self._number, self._places, self._zeros = number, places, zeros
        self._rows: list[dict[int, int]] = []
        self._accepting: set[int] = set()

    def dfa(self) -> ByteDfa:
        """The automaton."""
        begin, signed, zero = (self._state() for _ in range(3))
        whole = [self._state() for _ in range(self._number)]
        after = [[self._state() for _ in range(self._number)] for _ in range(self._places)]
        tail, point = self._state(), self._state()  # only zeros; the point before them
        first = {48 + d: whole[d % self._number] for d in range(1, 10)} | {48: zero}
        self._rows[begin], self._rows[signed] = first | {45: signed}, first
        self._digits(whole, whole)
        for place in range(self._places):
            if place + 1 < self._places:
                self._digits(after[place], after[place + 1])
            elif self._zeros or self._places:
                self._rows[after[place][0]][48] = tail
        points = [self._state() for _ in whole] if self._places else []
        for remainder, state in enumerate(whole):
            if self._places:
                self._rows[state][46] = points[remainder]
                self._rows[points[remainder]] = {
                    48 + d: after[0][(10 * remainder + d) % self._number] for d in range(10)
                }
            elif self._zeros and remainder == 0:
                self._rows[state][46] = point
        if 46 in self._rows[whole[0]]:
            self._rows[zero][46] = self._rows[whole[0]][46]
        self._rows[point] = {48: tail}
        self._rows[tail] = {48: tail}
        self._accepting |= {zero, tail}
        for place, states in enumerate([whole, *after]):
            scale = 10 ** (self._places - place)
            self._accepting |= {s for r, s in enumerate(states) if r * scale % self._number == 0}
        return minimal_of_rows(self._rows, self._accepting, begin)

    def _state(self) -> int:
        self._rows.append({})
        return len(self._rows) - 1

    def _digits(self, states: list[int], following: list[int]) -> None:
        for remainder, state in enumerate(states):
            for digit in range(10):
                self._rows[state][48 + digit] = following[(10 * remainder + digit) % self._number]
