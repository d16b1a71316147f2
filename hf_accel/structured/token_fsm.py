"""A byte automaton over a vocabulary: which tokens each state allows, and where they lead. Compressed by what is equal.

Tokens that lead alike from every state are one class; states that allow the same tokens share one packed mask. On real schemas
at 128k tokens that is some 200 classes and 100 masks. Knows no tensors: `mask_table.py` puts it on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_accel.structured.automaton import DEAD, ByteDfa
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.vocabulary import Vocabulary, expand

DONE = 0  # after the end of the sequence
MAX_PAIRS = 1 << 24  # (state, trie node) held at once


@dataclass(frozen=True, eq=False)
class TokenFsm:
    """A constraint on one vocabulary. State 0 is DONE, where only an end of sequence is allowed; state 1 is the start.

    Attributes:
        masks: [num_masks, num_words] int32, bit i % 32 of word i // 32: token i is allowed.
        mask_of: [num_states] int32, the mask of each state.
        classes: [vocab_size] int32, the class of each token; class 0 holds those that are allowed nowhere.
        table: [num_states, num_classes] int32, the next state; DEAD where the token is not allowed.
    """

    masks: np.ndarray
    mask_of: np.ndarray
    classes: np.ndarray
    table: np.ndarray
    start = 1

    @property
    def num_states(self) -> int:
        return len(self.mask_of)

    @property
    def num_bytes(self) -> int:
        return self.masks.nbytes + self.mask_of.nbytes + self.classes.nbytes + self.table.nbytes

    @property
    def is_consistent(self) -> bool:
        """Whether shapes, dtypes and ids fit together, of arrays that come from outside."""
        return (
            all(a.dtype == np.int32 for a in (self.masks, self.mask_of, self.classes, self.table))
            and self.masks.ndim == self.table.ndim == 2
            and self.mask_of.shape == self.table.shape[:1]
            and self.masks.shape[1] == -(-len(self.classes) // 32)
            and _within(self.mask_of, 0, len(self.masks))
            and _within(self.classes, 0, self.table.shape[1])
            and _within(self.table, DEAD, self.num_states)
        )

    def advance(self, state: int, token_id: int) -> int:
        """The state after a token, or DEAD."""
        return int(self.table[state, self.classes[token_id]])

    def allowed(self, state: int) -> np.ndarray:
        """Ids of the tokens that a state allows, in order."""
        bits = np.unpackbits(self.masks[self.mask_of[state]].view(np.uint8), bitorder="little")
        return np.flatnonzero(bits)


def compile_fsm(dfa: ByteDfa, vocabulary: Vocabulary) -> TokenFsm:
    """Run every token from every state.

    Raises:
        StructureError: the vocabulary cannot spell a text that the automaton accepts.
    """
    states, tokens, targets = _transitions(dfa, vocabulary)
    alive = _alive(states, targets, dfa.accepting)
    if not alive[0]:
        raise StructureError("this vocabulary has no tokens that spell a text which the constraint accepts")
    kept = alive[states] & alive[targets]
    states, tokens, targets = states[kept], tokens[kept], targets[kept]
    ids = np.cumsum(alive)  # 1 for the start on; DONE is 0
    states, targets = ids[states], ids[targets]
    num_states = int(alive.sum()) + 1
    ends = [DONE, *ids[alive & dfa.accepting].tolist()]
    eos = np.array(vocabulary.eos_token_ids, dtype=np.int64)
    states = np.concatenate([states, np.repeat(ends, len(eos))])
    tokens = np.concatenate([tokens, np.tile(eos, len(ends))])
    targets = np.concatenate([targets, np.full(len(ends) * len(eos), DONE)])
    classes, num_classes = _token_classes(states, tokens, targets, vocabulary.size)
    table = np.full((num_states, num_classes), DEAD, dtype=np.int32)
    table[states, classes[tokens]] = targets
    masks, mask_of = _masks(table, classes, vocabulary.size)
    return TokenFsm(masks, mask_of, classes.astype(np.int32), table)


def _within(values: np.ndarray, low: int, end: int) -> bool:
    return values.size > 0 and int(values.min()) >= low and int(values.max()) < end


def _transitions(dfa: ByteDfa, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(state, token, next state) of every token that survives from a state: breadth first through the trie, all states at once."""
    trie, table = vocabulary.trie, dfa.bytes_table
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    todo = [(np.arange(dfa.num_states), np.zeros(dfa.num_states, np.int64), np.arange(dfa.num_states))]
    while todo:
        origins, nodes, states = todo.pop()
        if len(origins) > 1 and int((trie.first_child[nodes + 1] - trie.first_child[nodes]).sum()) > MAX_PAIRS:
            half = len(origins) // 2
            todo += [(origins[:half], nodes[:half], states[:half]), (origins[half:], nodes[half:], states[half:])]
            continue
        owner, entry = expand(trie.first_child, nodes)
        children = trie.child[entry]
        after = table[states[owner], trie.byte[children]]
        live = after != DEAD
        owner, children, after = owner[live], children[live], after[live]
        origin = origins[owner]
        at, token_entry = expand(trie.first_token, children)
        if len(at):
            found.append((origin[at], trie.token[token_entry], after[at].astype(np.int64)))
        if len(children):
            todo.append((origin, children, after))
    if not found:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    return tuple(map(np.concatenate, zip(*found, strict=True)))  # type: ignore[return-value]


def _alive(states: np.ndarray, targets: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """[num_states] whether tokens lead from a state to an accepting one."""
    alive = accepting.copy()
    pairs = np.unique(states * len(accepting) + targets)
    states, targets = np.divmod(pairs, len(accepting))
    while True:
        grown = alive.copy()
        grown[states[alive[targets]]] = True
        if (grown == alive).all():
            return alive
        alive = grown


def _token_classes(
    states: np.ndarray, tokens: np.ndarray, targets: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, int]:
    """[vocab_size] class of each token, and their number: equal classes have equal sets of (state, next state).

    Sets are compared by two sums of random 64-bit numbers, one for each member: unequal ones agree with odds of 2^-100.
    """
    random = np.random.default_rng(0)
    pairs, which = np.unique(states * (int(states.max(initial=0)) + 1) + targets, return_inverse=True)
    numbers = random.integers(0, 1 << 63, size=(2, len(pairs)), dtype=np.uint64)
    order = np.argsort(tokens, kind="stable")
    present, first = np.unique(tokens[order], return_index=True)
    sums = np.add.reduceat(numbers[:, which.reshape(-1)[order]], first, axis=1) if len(first) else numbers[:, :0]
    _, class_of = np.unique(sums, axis=1, return_inverse=True)
    classes = np.zeros(vocab_size, dtype=np.int64)
    classes[present] = 1 + class_of.reshape(-1)
    return classes, int(classes.max(initial=0)) + 1


def _masks(table: np.ndarray, classes: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(masks, mask of each state): states that allow the same classes share one."""
    allowed, mask_of = np.unique(table != DEAD, axis=0, return_inverse=True)  # [num_masks, num_classes]
    num_words = -(-vocab_size // 32)
    packed = np.zeros((len(allowed), num_words * 4), dtype=np.uint8)
    for row, classes_allowed in zip(packed, allowed, strict=True):
        bits = np.packbits(classes_allowed[classes], bitorder="little")
        row[: len(bits)] = bits
    return packed.view(np.int32), mask_of.reshape(-1).astype(np.int32)
