"""A byte automaton over a vocabulary: which tokens each state allows, and where they lead. Compressed by what is equal.

Tokens that do alike in every state are one class; states that allow the same tokens share one packed mask. On real schemas at
128k tokens that is some 200 classes and 100 masks. Inside a counted text a state has a mask for each count that makes a
difference. Knows no tensors: `mask_table.py` puts it on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_accel.structured.automaton import ByteDfa
from hf_accel.structured.distance import Distances, find_distances
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.syntax import Counter, CounterConflict, StructureError, TooLarge
from hf_accel.structured.token_walk import NEVER, Moves, hash_columns, walk_tokens
from hf_accel.structured.vocabulary import Vocabulary

DONE = 0  # after the end of the sequence
FAR = 1 << 30
MAX_BYTES = 512 << 20  # of an automaton's table, and of its masks


@dataclass(frozen=True, eq=False)
class TokenFsm:
    """A constraint on one vocabulary. State 0 is DONE, where only an end of sequence is allowed; state 1 is the start.

    With every state goes a count, 0 outside of counted texts.

    Attributes:
        masks: [num_masks, num_words] int32, bit i % 32 of word i // 32: token i is allowed.
        rows: [num_rows] int32, masks by state and count.
        row_of: [num_states, 5] int32 (base, low, low_span, high, high_span): a state's row for a count is
            base + clip(count - low, 0, low_span) + clip(count - high, 0, high_span).
        classes: [vocab_size] int32, the class of each token; class 0 holds those that are allowed nowhere.
        table: [num_states, num_classes] int32, the next state; DEAD where no count allows the token.
        counts: [num_states, num_classes] int32, 2 * n for a token that adds n to the count, 2 * n + 1 for one that makes it n.
    """

    masks: np.ndarray
    rows: np.ndarray
    row_of: np.ndarray
    classes: np.ndarray
    table: np.ndarray
    counts: np.ndarray
    start = 1

    @property
    def num_states(self) -> int:
        return len(self.row_of)

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)

    @cached_property
    def distances(self) -> Distances:
        """To the end, from each state and count."""
        return find_distances(self)

    @property
    def is_consistent(self) -> bool:
        """Whether shapes, dtypes and ids fit together, of arrays that come from outside."""
        arrays = [getattr(self, name) for name in self.__dataclass_fields__]
        return (
            all(a.dtype == np.int32 for a in arrays)
            and [a.ndim for a in arrays] == [2, 1, 2, 1, 2, 2]
            and self.row_of.shape[1] == 5
            and self.table.shape == self.counts.shape == (self.num_states, self.table.shape[1])
            and self.masks.shape[1] == -(-len(self.classes) // 32)
            and _within(self.rows, 0, len(self.masks))
            and _within(self.row_of[:, 0], 0, len(self.rows))
            and _within(self.row_of[:, [0, 2, 4]].sum(axis=1), 0, len(self.rows))
            and _within(self.row_of[:, [2, 4]], 0, FAR)
            and _within(self.classes, 0, self.table.shape[1])
            and _within(self.table, DEAD, self.num_states)
        )

    def widened(self, vocab_size: int) -> TokenFsm:
        """This automaton for logits of `vocab_size`, not less than its own width: the ids added are never allowed."""
        more = vocab_size - len(self.classes)
        if not more:
            return self
        assert more > 0, "an automaton of more tokens than there are logits"
        words = -(-vocab_size // 32) - self.masks.shape[1]
        return dataclasses.replace(
            self, masks=np.pad(self.masks, ((0, 0), (0, words))), classes=np.pad(self.classes, (0, more))
        )

    def advance(self, state: int, token_id: int, count: int = 0) -> tuple[int, int]:
        """(state, count) after a token that is allowed."""
        symbol = self.classes[token_id]
        value, sets = divmod(int(self.counts[state, symbol]), 2)
        return int(self.table[state, symbol]), value if sets else count + value

    def allowed(self, state: int, count: int = 0) -> np.ndarray:
        """Ids of the tokens that are allowed, in order."""
        return np.flatnonzero(np.unpackbits(self._mask(state, count).view(np.uint8), bitorder="little"))

    def allows(self, state: int, token_id: int, count: int = 0) -> bool:
        """Whether a token is allowed."""
        return bool(int(self._mask(state, count)[token_id >> 5]) >> (token_id & 31) & 1)

    def _mask(self, state: int, count: int) -> np.ndarray:
        base, low, low_span, high, high_span = self.row_of[state].tolist()
        row = base + min(max(count - low, 0), low_span) + min(max(count - high, 0), high_span)
        return np.asarray(self.masks[self.rows[row]])


def compile_fsm(dfa: ByteDfa, vocabulary: Vocabulary) -> TokenFsm:
    """Run every token from every state and keep what is different once.

    Raises:
        StructureError: the vocabulary cannot spell a text that the automaton accepts.
        TooLarge: the automaton would take more than MAX_BYTES.
    """
    moves = walk_tokens(dfa, vocabulary.trie)
    alive = _alive(moves, dfa.accepting)
    if not alive[0]:
        raise StructureError("this vocabulary has no tokens that spell a text which the constraint accepts")
    moves = moves.where(alive[moves.state] & alive[moves.target])
    _check_counted(dfa, moves)
    ids = np.cumsum(alive)  # 1 for the start on; DONE is 0
    counters = [None, *(c for c, lives in zip(dfa.counters, alive, strict=True) if lives)]
    classes = np.zeros(vocabulary.size, dtype=np.int64)
    class_of_column, num_classes = _different_columns(moves)
    classes[moves.token] = class_of_column[moves.column_of]
    classes[list(vocabulary.eos_token_ids)] = num_classes
    shape = (len(counters), num_classes + 1)
    if 2 * 4 * shape[0] * shape[1] > MAX_BYTES:
        raise TooLarge(
            f"the constraint needs {shape[0]} states for {shape[1]} kinds of tokens: make it simpler, or use smaller bounds"
        )
    table, counts = np.full(shape, DEAD, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    where = (ids[moves.state], class_of_column[moves.column])
    table[where], counts[where] = ids[moves.target], 2 * moves.value + moves.sets
    table[np.array([DONE, *ids[alive & dfa.accepting].tolist()]), num_classes] = DONE
    allowed, row_of = _rows(table, _CountedMoves(moves, ids, class_of_column), counters)
    masks, rows = _masks(allowed, classes)
    return TokenFsm(masks, rows, row_of, classes.astype(np.int32), table, counts)


def _within(values: np.ndarray, low: int, end: int) -> bool:
    return values.size > 0 and int(values.min()) >= low and int(values.max()) < end


def _alive(moves: Moves, accepting: np.ndarray) -> np.ndarray:
    """[num_states] whether tokens lead from a state to an accepting one."""
    alive = accepting.copy()
    states, targets = np.divmod(np.unique(moves.state * len(accepting) + moves.target), len(accepting))
    while True:
        grown = alive.copy()
        grown[states[alive[targets]]] = True
        if (grown == alive).all():
            return alive
        alive = grown


def _check_counted(dfa: ByteDfa, moves: Moves) -> None:
    """Every count must have a way on: a token for one more unit, or for a part of one, and one that ends the text at once."""
    homes = [s for s, c in enumerate(dfa.counters) if c is not None and c.home]
    for home in homes:
        of_home = moves.state == home
        if not ((moves.leaves == 0) & of_home).any() or not ((moves.need == 1) & ~moves.sets & of_home).any():
            raise CounterConflict("this vocabulary cannot end a text of bounded length everywhere")


def _different_columns(moves: Moves) -> tuple[np.ndarray, int]:
    """(class of each column, number of classes): class 0 is of columns without entries, the others are of equal ones."""
    first = np.searchsorted(moves.column, np.arange(int(moves.column_of.max(initial=-1)) + 2))
    names = hash_columns(first, moves.state, moves.target, moves.value, moves.sets, moves.need, moves.leaves)
    ids = {(0, 0): 0}
    return np.array([ids.setdefault(name, len(ids)) for name in names], dtype=np.int64), len(ids)


class _CountedMoves:
    """What tokens need of the count, by state and class."""

    def __init__(self, moves: Moves, ids: np.ndarray, class_of_column: np.ndarray) -> None:
        order = np.argsort(moves.state, kind="stable")
        self._classes = class_of_column[moves.column[order]]
        self._need, self._leaves = moves.need[order], moves.leaves[order]
        self._first = np.searchsorted(ids[moves.state[order]], np.arange(int(ids[-1]) + 2))

    def of(self, state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(classes, need, leaves) of the moves of a state."""
        those = slice(self._first[state], self._first[state + 1])
        return self._classes[those], self._need[those], self._leaves[those]


def _rows(table: np.ndarray, moves: _CountedMoves, counters: Sequence[Counter | None]) -> tuple[np.ndarray, np.ndarray]:
    """(allowed [num_rows, num_classes], row_of): a row for each state, or for each of a state's counts that differ."""
    allowed = table != DEAD
    row_of = np.zeros((len(table), 5), dtype=np.int32)
    row_of[:, 0] = np.arange(len(table))
    blocks, size = [allowed], len(table)
    for state, counter in enumerate(counters):
        if counter is None:
            continue
        classes, need, leaves = moves.of(state)
        # Nothing that a token needs is more than `depth`: only counts so near to a bound make a difference.
        depth = int(max(need.max(initial=0), leaves.max(initial=0)))
        low, high = counter.low - depth - 1, counter.high - depth
        row_of[state] = size, low, depth + 1, high, depth
        counts = _representatives(row_of[state], counter.high)[:, None]
        block = np.repeat(allowed[state][None], len(counts), axis=0)
        block[:, classes] = (need <= counter.high - counts) & ((leaves == NEVER) | (counts + leaves >= counter.low))
        blocks.append(block)
        size += len(block)
    return np.concatenate(blocks), row_of


def _representatives(row: np.ndarray, most: int) -> np.ndarray:
    """For each row of a state, a count that has it (any, where none has)."""
    _, low, low_span, high, high_span = row.tolist()
    found = np.zeros(low_span + high_span + 1, dtype=np.int64)
    near = [*range(max(low, 0), low + low_span + 1), *range(max(high, 0), high + high_span + 1), 0]
    for count in near:
        if 0 <= count <= most:
            found[min(max(count - low, 0), low_span) + min(max(count - high, 0), high_span)] = count
    return found


def _masks(allowed: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(masks, mask of each row): rows that allow the same classes share one."""
    ids: dict[bytes, int] = {}
    rows = np.array([ids.setdefault(row.tobytes(), len(ids)) for row in np.packbits(allowed, axis=1)], dtype=np.int32)
    _, first = np.unique(rows, return_index=True)
    packed = np.zeros((len(first), -(-len(classes) // 32) * 4), dtype=np.uint8)
    if packed.nbytes > MAX_BYTES:
        raise TooLarge(
            f"the constraint needs {len(packed)} masks of {len(classes)} tokens: make it simpler, or use smaller bounds"
        )
    for row, allowed_classes in zip(packed, allowed[first], strict=True):
        bits = np.packbits(allowed_classes.take(classes), bitorder="little")
        row[: len(bits)] = bits
    return packed.view(np.int32), rows
