"""Constrained rows of a batch: where each one's text stands in its automaton, kept on the device from step to step.

A row's state is advanced by the token that was chosen for it, known to the host or not. Where the host takes a token back (a
step that failed, a request that begins again) the state is found again from the tokens that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_accel.engine.dynamic_rows import DynamicConstraint
from hf_accel.engine.upload import upload
from hf_accel.sampling_params import SamplingParams
from hf_accel.structured.compiler import Compiled, ConstraintCompiler, cache_folder
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.dynamic import DynamicGrammar
from hf_accel.structured.mask_table import FREE, MaskTable, mask_and_keep_alive
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import TokenFsm
from hf_accel.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from hf_accel.engine.logits_edits import SamplingRow


class RowConstraint:
    """One request's automaton and where its output stands."""

    def __init__(self, fsm: TokenFsm, table: MaskTable) -> None:
        self.fsm, self.table = fsm, table
        self._start = table.start(fsm)
        self._state: Tensor | None = None  # [1] int64
        self._num_tokens = -1  # of the output, that `_state` has seen

    def state(self, row: SamplingRow, length: int) -> Tensor:
        """[1] int64: the state before the token that follows `length` tokens."""
        num_tokens = length - row.num_prompt_tokens
        if self._state is None or num_tokens != self._num_tokens:
            output = row.token_ids[row.num_prompt_tokens : length]
            assert len(output) == num_tokens, "a token that is not known yet has advanced the state already"
            state = self.table.state_after(self.fsm, output)
            self._state, self._num_tokens = upload([state], torch.long, self.table.device), num_tokens
        return self._state

    def advance(self, state: Tensor) -> None:
        """A token was chosen; `state` [1] is what comes after it."""
        self._state = state
        self._num_tokens += 1


class ConstrainedRows:
    """Those of a batch. All share one table."""

    def __init__(self, indices: list[int], constraints: list[RowConstraint], states: Tensor) -> None:
        self._indices, self._constraints = indices, constraints
        self._states = states  # [num_rows], FREE for rows without a constraint
        self._table = constraints[0].table

    @classmethod
    def among(cls, rows: Sequence[SamplingRow], lengths: Sequence[int], device: torch.device) -> ConstrainedRows | None:
        """Those of `rows` with an automaton, or None if there are none."""
        found = [(i, row.constraint) for i, row in enumerate(rows) if isinstance(row.constraint, RowConstraint)]
        if not found:
            return None
        states = [torch.full((1,), FREE, dtype=torch.long, device=device)] * len(rows)
        for i, constraint in found:
            states[i] = constraint.state(rows[i], lengths[i])
        return cls([i for i, _ in found], [c for _, c in found], torch.cat(states))

    def masked(self, scores: Tensor, *, may_be_lost: bool) -> Tensor:
        """A copy of `scores` in which only allowed tokens have a chance; where edits had left none of these, each has."""
        if may_be_lost:
            return mask_and_keep_alive(self._table, scores, self._states)
        return self._table.masked(scores, self._states)

    def advance(self, token_ids: Tensor) -> None:
        """Take in the rows' chosen tokens [num_rows]."""
        states = self._table.advance(self._states, token_ids)
        for i, constraint in zip(self._indices, self._constraints, strict=True):
            constraint.advance(states[i : i + 1])


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
        self._compiler: ConstraintCompiler | None = None
        self._table: MaskTable | None = None

    def compile(self, params: SamplingParams) -> Compiled | None:
        """The automaton or grammar that `params` ask for, compiled now, in the caller's thread; None without a constraint.

        Raises:
            StructureError: the constraint is not supported, or there is no tokenizer or eos to satisfy it with.
        """
        constraint = constraint_of(params)
        if constraint is None:
            return None
        if self._compiler is None:
            if self._tokenizer is None:
                raise StructureError("a constraint needs a tokenizer: Engine(model, tokenizer)")
            if not self._eos:
                raise StructureError("a constraint needs an end of sequence: set model.generation_config.eos_token_id")
            vocabulary = Vocabulary.of(self._tokenizer, self._vocab_size, self._eos)
            self._compiler = ConstraintCompiler(vocabulary, cache_folder())
        return self._compiler.compile(constraint)

    def open(self, fsm: Compiled) -> RowConstraint | DynamicConstraint:
        """A row at the start of an automaton or a grammar. Called under the engine's lock."""
        if isinstance(fsm, DynamicGrammar):
            return DynamicConstraint(fsm)
        if self._table is None:
            self._table = MaskTable(self._vocab_size, self._eos, self._device)
        return RowConstraint(fsm, self._table)


def constraint_of(params: SamplingParams) -> Constraint | None:
    """What `params` ask of the output. Raises StructureError for what is no constraint."""
    if params.regex is not None:
        return Constraint.regex(params.regex)
    if params.json_schema is not None:
        return Constraint.json_schema(params.json_schema)
    if params.choice is not None:
        return Constraint.choice(params.choice)
    if params.grammar is not None:
        return Constraint.grammar(params.grammar)
    return Constraint.json_object() if params.json_object else None
