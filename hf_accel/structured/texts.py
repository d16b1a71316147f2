"""The minimal automaton of a finite set of byte strings, built as they are added: it never holds more than what it shares."""

from __future__ import annotations

from collections.abc import Iterable

from hf_accel.structured.syntax import TooLarge
from hf_accel.structured.time_limit import check_time


def shared_texts(texts: Iterable[bytes], max_states: int) -> tuple[list[dict[int, int]], set[int]]:
    """(byte -> next state of each state, accepting states) of exactly these byte strings; state 0 is the start.

    Raises:
        TooLarge: more than `max_states` states.
    """
    builder = _Builder(max_states)
    for number, data in enumerate(sorted(set(texts))):
        if number % 64 == 0:
            check_time()
        builder.add(data)
    return builder.finish()


class _Builder:
    """Takes byte strings in order: what comes after their common beginning has all its followers, and is shared if it is known."""

    def __init__(self, max_states: int) -> None:
        self._max_states = max_states
        self._rows: list[dict[int, int]] = [{}]
        self._accepting: set[int] = set()
        self._complete: dict[object, int] = {}  # states by all that tells them apart
        self._unused: list[int] = []
        self._path, self._before = [0], b""  # states of the text before, by length

    def add(self, data: bytes) -> None:
        pairs = zip(self._before, data, strict=False)
        shorter = min(len(self._before), len(data))
        common = next((i for i, (x, y) in enumerate(pairs) if x != y), shorter)
        self._share(common)
        for byte in data[common:]:
            state = self._new()
            self._rows[self._path[-1]][byte] = state
            self._path.append(state)
        self._accepting.add(self._path[-1])
        self._before = data

    def finish(self) -> tuple[list[dict[int, int]], set[int]]:
        self._share(0)
        gone = {*self._unused}
        kept = [state for state in range(len(self._rows)) if state not in gone]
        new_id = {state: i for i, state in enumerate(kept)}
        rows = [{byte: new_id[target] for byte, target in self._rows[state].items()} for state in kept]
        return rows, {new_id[state] for state in self._accepting}

    def _share(self, length: int) -> None:
        """The states after the first `length` bytes of the text before are complete."""
        while len(self._path) > length + 1:
            state = self._path.pop()
            name = (state in self._accepting, tuple(self._rows[state].items()))
            same = self._complete.setdefault(name, state)
            if same != state:
                self._rows[self._path[-1]][self._before[len(self._path) - 1]] = same
                self._accepting.discard(state)
                self._unused.append(state)

    def _new(self) -> int:
        if self._unused:
            state = self._unused.pop()
            self._rows[state] = {}
            return state
        if len(self._rows) >= self._max_states:
            raise TooLarge(f"the texts need more than {self._max_states} states: fewer or shorter texts are needed")
        self._rows.append({})
        return len(self._rows) - 1
