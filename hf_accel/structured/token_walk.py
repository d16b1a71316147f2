"""Every token from every state of a byte automaton: where it leads, what it does to the count of a counted text, and which
counts allow it. One breadth-first walk through the vocabulary's trie for all states at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_accel.structured.automaton import ByteDfa
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.vocabulary import TokenTrie, expand

MAX_PAIRS = 1 << 24  # (state, trie node) held at once
NEVER = -1


@dataclass(frozen=True, eq=False)
class Moves:
    """One entry for each (state, token) that some count allows.

    Attributes:
        state, token, target: [num_moves] int64.
        value: units that the token adds to the count, or with `sets` the count that it leaves.
        sets: [num_moves] bool.
        need: units that must be left of the counted text that `state` is in.
        leaves: units that the text has gained when the token ends it, which must make at least its lower bound; NEVER where
            the token stays inside, or `state` is in no counted text.
    """

    state: np.ndarray
    token: np.ndarray
    target: np.ndarray
    value: np.ndarray
    sets: np.ndarray
    need: np.ndarray
    leaves: np.ndarray

    def where(self, kept: np.ndarray) -> Moves:
        return Moves(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


@dataclass(eq=False)
class _Front:
    """Walks that have come equally far: `count` is of the origin's text until that ends (`left`), then of the present one."""

    origin: np.ndarray
    node: np.ndarray
    state: np.ndarray
    count: np.ndarray
    left: np.ndarray
    leaves: np.ndarray

    def where(self, kept: np.ndarray) -> _Front:
        return _Front(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def walk_tokens(dfa: ByteDfa, trie: TokenTrie) -> Moves:
    """Run every token from every state."""
    limits = _Limits(dfa)
    states = np.arange(dfa.num_states)
    zeros, outside = np.zeros(dfa.num_states, np.int64), ~limits.inside
    todo = [_Front(states, zeros, states, zeros, outside, np.full(dfa.num_states, NEVER))]
    found = []
    while todo:
        front = todo.pop()
        size = len(front.origin)
        if size > 1 and int((trie.first_child[front.node + 1] - trie.first_child[front.node]).sum()) > MAX_PAIRS:
            todo += [front.where(slice(None, size // 2)), front.where(slice(size // 2, None))]  # type: ignore[arg-type]
            continue
        front = _step(dfa, trie, limits, front)
        if len(front.origin):
            found.append(_ends(trie, limits, front))
            todo.append(front)
    if not found:
        empty = np.zeros(0, dtype=np.int64)
        return Moves(empty, empty, empty, empty, empty.astype(bool), empty, empty)
    return Moves(*(np.concatenate([getattr(m, name) for m in found]) for name in Moves.__dataclass_fields__))


class _Limits:
    """The counters of an automaton's states as arrays."""

    def __init__(self, dfa: ByteDfa) -> None:
        self.inside = np.array([c is not None for c in dfa.counters])
        self.home = np.array([c is not None and c.home for c in dfa.counters])
        self.low = np.array([0 if c is None else c.low for c in dfa.counters], dtype=np.int64)
        self.high = np.array([0 if c is None else c.high for c in dfa.counters], dtype=np.int64)


def _step(dfa: ByteDfa, trie: TokenTrie, limits: _Limits, front: _Front) -> _Front:
    """One byte further."""
    owner, entry = expand(trie.first_child, front.node)
    child = trie.child[entry]
    after = dfa.bytes_table[front.state[owner], trie.byte[child]].astype(np.int64)
    live = after != DEAD
    before = front.where(owner[live])
    after, child = after[live], child[live]
    was, now = limits.inside[before.state], limits.inside[after]
    ends, begins = was & ~now, ~was & now
    count = before.count + (was & limits.home[after])
    leaves = np.where(ends & ~before.left, count, before.leaves)
    # Texts that begin inside the token have a known count: bounds are checked here and now.
    wrong = ends & before.left & (count < limits.low[before.state])
    left = before.left | ends
    count = np.where(ends | begins, 0, count)
    started = now & left & (count + ~limits.home[after] > limits.high[after])
    return _Front(before.origin, child, after, count, left, leaves).where(~(wrong | started))


def _ends(trie: TokenTrie, limits: _Limits, front: _Front) -> Moves:
    """The tokens that end here."""
    at, entry = expand(trie.first_token, front.node)
    front = front.where(at)
    in_origins_text = limits.inside[front.origin] & ~front.left
    need = np.where(in_origins_text, front.count + ~limits.home[front.state], np.maximum(front.leaves, 0))
    return Moves(front.origin, trie.token[entry], front.state, front.count, front.left, need, front.leaves)
