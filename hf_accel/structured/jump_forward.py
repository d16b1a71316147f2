"""Guesses of the tokens that follow in an automaton. Owns no answers: each guess is verified by the model under the mask.

Where the automaton forces the text the first guess is its longest token; after that a state's guess is the token that was
chosen in it before, trusted by a counter that saturates, as branch predictors do. So a model that spells forced text in other
tokens, or always puts the optional space, is soon guessed right, and in free text nothing is guessed. Plain ints; no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from hf_accel.structured.token_fsm import DONE, TokenFsm
from hf_accel.structured.vocabulary import Vocabulary

MAX_TRUST = 2
MOST_FORCED = 256  # allowed tokens of a state that are compared with each other at most
MIN_GAIN = 2  # guessed tokens for which a row sits out a step that would be launched before they can be verified


class TokenPredictor:
    """What comes next in each state of one automaton. Shared by all rows of it, whose threads hold `lock` when they ask.

    Args:
        fsm: the automaton.
        vocabulary: that it was compiled for.
    """

    def __init__(self, fsm: TokenFsm, vocabulary: Vocabulary) -> None:
        self.fsm = fsm
        self.lock = threading.Lock()
        self._tokens, self._eos = vocabulary.tokens, frozenset(vocabulary.eos_token_ids)
        self._guess: dict[int, int] = {}  # token by state, -1 for none
        self._trust: dict[int, int] = {}  # whoever is trusted less than 0 is not proposed

    def observe(self, state: int, count: int, token_id: int) -> None:
        """A row chose this token in this state."""
        if token_id in self._eos:
            return
        guess = self._guess[state] if state in self._guess else self._first_guess(state, count)
        trust = self._trust[state]
        if token_id == guess:
            self._trust[state] = min(trust + 1, MAX_TRUST)
        else:
            self._trust[state] = trust = min(trust - 1, 0)
            if trust < 0:
                self._guess[state], self._trust[state] = token_id, -1

    def propose(self, state: int, count: int, limit: int) -> list[tuple[int, int, int]]:
        """(token, state after it, count after it) of the tokens that are likely to follow, at most `limit`; never an eos."""
        found: list[tuple[int, int, int]] = []
        while len(found) < limit and state != DONE:
            token_id = self._guess[state] if state in self._guess else self._first_guess(state, count)
            if token_id < 0 or self._trust[state] < 0 or not self.fsm.allows(state, token_id, count):
                break
            state, count = self.fsm.advance(state, token_id, count)
            found.append((token_id, state, count))
        return found

    def _first_guess(self, state: int, count: int) -> int:
        token_id = self._forced(state, count)
        self._guess[state], self._trust[state] = token_id, 0 if token_id >= 0 else -1
        return token_id

    def _forced(self, state: int, count: int) -> int:
        """The longest allowed token that agrees with every other one: one of the two begins with the other; or -1."""
        allowed = self.fsm.allowed(state, count).tolist()
        if len(allowed) > MOST_FORCED:
            return -1
        texts = [(self._tokens[i], i) for i in allowed]
        for text, token_id in sorted(texts, key=lambda pair: -len(pair[0] or b"")):
            if text is not None and all(t is not None and (t.startswith(text) or text.startswith(t)) for t, _ in texts):
                return int(token_id)
        return -1


class GrammarMatcher:
    """Where one row's output stands, as far as its tokens are known."""

    def __init__(self, fsm: TokenFsm) -> None:
        self.fsm = fsm
        self.state, self.count, self._num_tokens = fsm.start, 0, 0

    def follow(self, token_ids: Sequence[int], first: int, predictor: TokenPredictor | None = None) -> tuple[int, int]:
        """(state, count) after the tokens [first, end) of a row, each of which was allowed.

        Costs the tokens that are new since the last call. `predictor` is told of those.
        """
        num_tokens = len(token_ids) - first
        if num_tokens < self._num_tokens:
            self.state, self.count, self._num_tokens = self.fsm.start, 0, 0
        for i in range(first + self._num_tokens, first + num_tokens):
            if self.state != DONE:
                if predictor is not None:
                    predictor.observe(self.state, self.count, token_ids[i])
                self.state, self.count = self.fsm.advance(self.state, token_ids[i], self.count)
                if self.state < DONE:  # not allowed: the row is over
                    self.state, self.count = DONE, 0
        self._num_tokens = num_tokens
        return self.state, self.count
