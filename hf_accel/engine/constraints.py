"""Constrained rows of a batch: where each one's text stands in its automaton, kept on the device from step to step.

A row's state is advanced by the token that was chosen for it, known to the host or not. Where the host takes a token back (a
step that failed, a request that begins again) the state is found again from the tokens that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_accel.engine.closing_rows import Budget, ClosingRows
from hf_accel.engine.dynamic_rows import DynamicConstraint
from hf_accel.engine.upload import upload
from hf_accel.sampling_params import SamplingParams
from hf_accel.structured.closing import Closing, check_budget
from hf_accel.structured.compiler import Compiled, compiler_for
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.dynamic import DynamicGrammar
from hf_accel.structured.jump_forward import MIN_GAIN, GrammarMatcher, TokenPredictor
from hf_accel.structured.mask_table import FREE, MaskTable, mask_and_keep_alive
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import TokenFsm
from hf_accel.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from hf_accel.engine.logits_edits import SamplingRow

ARENA_BYTES = 512 << 20
"""Once a table is larger, new automata go to a new one, and the old one goes with the last of its rows."""


class RowConstraint:
    """One request's automaton and where its output stands: on the device, and on the host as far as its tokens are known; and
    where it must have ended.

    It is the request's `Drafter`, too. The scheduler's threads know the host's side, under the predictor's lock; whoever samples
    reads the device's side, and of the host's only what `settle` has left.
    """

    def __init__(
        self, predictor: TokenPredictor, table: MaskTable, num_prompt_tokens: int, budget: Budget | None = None
    ) -> None:
        self.fsm, self.table, self.budget = predictor.fsm, table, budget
        self._predictor, self._first = predictor, num_prompt_tokens
        self._matcher = GrammarMatcher(self.fsm)
        table.start(self.fsm)
        self._settled = (-1, 0)  # (tokens of the output, state after them)
        self._state: Tensor | None = None  # [1] int64
        self._num_tokens = -1  # of the output, that `_state` has seen

    def draft(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """See `Drafter`."""
        with self._predictor.lock:
            state = self._matcher.follow(token_ids, self._first, self._predictor)
            return tuple(token_id for token_id, _, _ in self._predictor.propose(*state, limit))

    def waits(self, token_ids: Sequence[int]) -> bool:
        """See `Drafter`."""
        return len(self.draft(token_ids, 1 + MIN_GAIN)) > MIN_GAIN

    def after(self, token_ids: Sequence[int], draft: Sequence[int]) -> list[GuessedState]:
        """The states after the first, the first two, ... of some guesses that follow known tokens."""
        with self._predictor.lock:
            state, count = self._matcher.follow(token_ids, self._first, self._predictor)
        states = []
        for token_id in draft:
            state, count = self.fsm.advance(state, token_id, count)
            states.append(self.table.global_state(self.fsm, state, count))
        on_device = upload(states, torch.long, self.table.device)
        return [GuessedState(self.table, on_device[i : i + 1], self.budget) for i in range(len(states))]

    def settle(self, token_ids: Sequence[int]) -> None:
        """All tokens are known, and no step before is still to choose one: note where the output stands."""
        with self._predictor.lock:
            state = self._matcher.follow(token_ids, self._first, self._predictor)
        self._settled = (len(token_ids) - self._first, self.table.global_state(self.fsm, *state))

    def state(self, row: SamplingRow, length: int) -> Tensor:
        """[1] int64: the state before the token that follows `length` tokens."""
        num_tokens = length - row.num_prompt_tokens
        if self._state is None or num_tokens != self._num_tokens:
            settled, state = self._settled
            assert settled == num_tokens, "a token that is not known yet has advanced the state already"
            self._state, self._num_tokens = upload([state], torch.long, self.table.device), num_tokens
        return self._state

    def advance(self, state: Tensor) -> None:
        """A token was chosen; `state` [1] is what comes after it."""
        self._state = state
        self._num_tokens += 1


class GuessedState:
    """Where an output stands if some guessed tokens hold; in a `RowConstraint`'s place for the token after them."""

    def __init__(self, table: MaskTable, state: Tensor, budget: Budget | None) -> None:
        self.table, self._state, self.budget = table, state, budget

    def state(self, row: SamplingRow, length: int) -> Tensor:
        """[1] int64."""
        return self._state

    def advance(self, state: Tensor) -> None:
        """Nothing: whether the guesses hold is not known here."""


class ConstrainedRows:
    """Those of a batch, by the table that their states are in: mostly there is one."""

    def __init__(
        self,
        parts: list[tuple[MaskTable, Tensor, list[tuple[int, RowConstraint | GuessedState]]]],
        closing: ClosingRows | None = None,
    ) -> None:
        self._parts = parts  # with states [num_rows], FREE for rows of other tables and rows without a constraint
        self._closing = closing

    @classmethod
    def among(cls, rows: Sequence[SamplingRow], lengths: Sequence[int], device: torch.device) -> ConstrainedRows | None:
        """Those of `rows` with an automaton, or None if there are none."""
        by_table: dict[MaskTable, list[tuple[int, RowConstraint | GuessedState]]] = {}
        for i, row in enumerate(rows):
            if isinstance(row.constraint, RowConstraint | GuessedState):
                by_table.setdefault(row.constraint.table, []).append((i, row.constraint))
        if not by_table:
            return None
        free = torch.full((1,), FREE, dtype=torch.long, device=device)
        everyone, parts = [free] * len(rows), []
        budgets: list[Budget | None] = [None] * len(rows)
        for table, found in by_table.items():
            own = [free] * len(rows)
            for i, constraint in found:
                everyone[i] = own[i] = constraint.state(rows[i], lengths[i])
                budgets[i] = constraint.budget
            parts.append((table, torch.cat(own), found))
        closing = None
        if any(budget is not None for budget in budgets):
            closing = ClosingRows.among(budgets, lengths, torch.cat(everyone))
        return cls(parts, closing)

    def masked(self, scores: Tensor, *, may_be_lost: bool, in_place: bool = False) -> Tensor:
        """`scores` with only allowed tokens having a chance; where edits had left none of these, each has. A copy, unless
        `in_place` says that it may be `scores` itself."""
        close = None if self._closing is None else self._closing.apply
        for number, (table, states, _) in enumerate(self._parts):
            if may_be_lost:
                scores = mask_and_keep_alive(table, scores, states, close)
            elif in_place or number:
                table.apply(scores, states)
            else:
                scores = table.masked(scores, states)
        if close is not None and not may_be_lost:
            close(scores)
        return scores

    def advance(self, token_ids: Tensor) -> None:
        """Take in the rows' chosen tokens [num_rows]."""
        for table, states, found in self._parts:
            after = table.advance(states, token_ids).split(1)
            for i, constraint in found:
                constraint.advance(after[i])


class _Arena:
    """A table, and what belongs to the automata that are in it."""

    def __init__(self, table: MaskTable) -> None:
        self.table = table
        self.predictors: dict[TokenFsm, TokenPredictor] = {}
        self.closing: dict[TokenFsm, Closing] = {}


class EngineConstraints:
    """Compiles the constraints of an engine's requests, each once.

    Args:
        tokenizer: a fast HF tokenizer, or None.
        vocab_size: width of the logits.
        eos_token_ids: ids that may end an output.
        device: where logits are.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos, self._device = tuple(sorted(eos_token_ids)), device
        self._arena: _Arena | None = None
        self._vocabulary: Vocabulary | None = None

    def compile(self, params: SamplingParams, max_new_tokens: int) -> Compiled | None:
        """What `params` ask for, compiled, or None without a constraint. Waits for a thread that compiles; holds no lock.

        Raises:
            StructureError: the constraint is not supported, or there is no tokenizer or eos to satisfy it with; or it shall
                be satisfied within `max_new_tokens`, and that cannot be.
        """
        return self.compile_all([params], [max_new_tokens])[0]

    def compile_all(self, each: Sequence[SamplingParams], budgets: Sequence[int]) -> list[Compiled | None]:
        """`compile` for several requests, equal constraints once."""
        known = {id(params): constraint_of(params) for params in each}
        constraints = [known[id(params)] for params in each]
        if not any(constraints):
            return [None] * len(each)
        if self._tokenizer is None:
            raise StructureError("a constraint needs a tokenizer: Engine(model, tokenizer)")
        if not self._eos:
            raise StructureError("a constraint needs an end of sequence: set model.generation_config.eos_token_id")
        compiler = compiler_for(self._tokenizer, self._eos, self._vocab_size)
        self._vocabulary = compiler.vocabulary
        futures = [None if c is None else compiler.submit(c) for c in constraints]
        found = [None if f is None else f.result() for f in futures]
        for fsm, params, max_new_tokens in zip(found, each, budgets, strict=True):
            if params.close_within_budget:
                check_budget(fsm, max_new_tokens)
        return found

    def open(
        self,
        fsm: Compiled,
        num_prompt_tokens: int,
        closes_at: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> RowConstraint | DynamicConstraint:
        """A row at the start of what was compiled, no wider than the logits, behind its prompt. Called under the engine's lock.

        Args:
            fsm: what was compiled.
            num_prompt_tokens: tokens before the output.
            closes_at: the output is over within so many tokens, with the prompt's; None: it may be cut off.
            vocabulary: of an automaton which another has compiled.
        """
        if isinstance(fsm, DynamicGrammar):
            return DynamicConstraint(fsm)
        known = vocabulary or self._vocabulary
        assert known is not None, "nothing was compiled"
        arena = self._arena
        if arena is None or (fsm not in arena.predictors and arena.table.num_bytes > ARENA_BYTES):
            arena = self._arena = _Arena(MaskTable(self._vocab_size, self._eos, self._device))
        predictor = arena.predictors.get(fsm)
        if predictor is None:
            predictor = arena.predictors[fsm] = TokenPredictor(fsm, known)
        budget = None
        if closes_at is not None:
            if fsm not in arena.closing:
                arena.closing[fsm] = Closing(fsm, arena.table)
            budget = Budget(arena.closing[fsm], closes_at)
        return RowConstraint(predictor, arena.table, num_prompt_tokens, budget)


def constraint_fields(constraint: RowConstraint | DynamicConstraint | None, *, may_jump: bool) -> dict[str, Any]:
    """The fields of `Request` that follow from a row's constraint."""
    return {
        "constraint": constraint,
        "host_constraint": isinstance(constraint, DynamicConstraint),
        "drafter": constraint if may_jump and isinstance(constraint, RowConstraint) else None,
    }


def constraint_of(params: SamplingParams) -> Constraint | None:
    """What `params` ask of the output. Raises StructureError for what is no constraint."""
    return constraint_from({name: getattr(params, name) for name in CONSTRAINTS})


CONSTRAINTS = ("regex", "json_schema", "choice", "grammar", "json_object", "constraint")
"""Names by which a constraint is given, to a request or to `generate`."""


def constraint_from(given: Mapping[str, Any]) -> Constraint | None:
    """The constraint that was given by one of `CONSTRAINTS`; None if by none. Raises StructureError for what is none."""
    for name in CONSTRAINTS:
        value = given.get(name)
        if name == "json_object" and value:
            return Constraint.json_object()
        if name != "json_object" and value is not None:
            return Constraint.of(value) if name == "constraint" else getattr(Constraint, name)(value)
    return None
