"""Constraints as logits processors for plain `model.generate(..., logits_processor=[...])`.

A row's state is found again from its token ids: by a hash of all tokens but the last among those of earlier steps. So rows may
be permuted (beams), repeated, or come with lengths that jump (assisted decoding), and one object serves any number of calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_accel.structured.compiler import ConstraintCompiler, cache_folder
from hf_accel.structured.constraint import WHITESPACE, Constraint
from hf_accel.structured.dynamic import DynamicGrammar
from hf_accel.structured.dynamic_rows import DynamicRows
from hf_accel.structured.mask_table import DONE, FREE, MaskTable, mask_and_keep_alive
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.vocabulary import Vocabulary

_HISTORY = 64  # steps whose rows are remembered
_MULTIPLIER = -7046029254386353131  # odd, as int64


class ConstraintLogitsProcessor:
    """Lets through only tokens with which the generated text can still satisfy its constraint.

    Args:
        constraints: one for all rows, or one for each row of the batch (a row's samples and beams share its own).
        tokenizer: a fast HF tokenizer.
        eos_token_ids: ids that may end a text that is complete; the tokenizer's by default.

    Raises:
        StructureError: a constraint is not supported, or this vocabulary cannot spell it.
    """

    def __init__(
        self, constraints: Constraint | Sequence[Constraint], tokenizer: Any, eos_token_ids: Iterable[int] | None = None
    ) -> None:
        self._constraints = [constraints] if isinstance(constraints, Constraint) else list(constraints)
        eos = [tokenizer.eos_token_id] if eos_token_ids is None else list(eos_token_ids)
        if not eos or None in eos:
            raise StructureError("a constraint needs an end of sequence: give eos_token_ids")
        vocabulary = Vocabulary.of(tokenizer, len(tokenizer), eos)
        compiler = ConstraintCompiler(vocabulary, cache_folder())
        self._fsms = [compiler.compile(c) for c in self._constraints]
        self._vocabulary = vocabulary
        self._tables: dict[torch.device, MaskTable] = {}
        self._memory: _Memory | None = None
        self._dynamic = DynamicRows()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masked scores [num_rows, vocab_size] for rows of token ids [num_rows, length].

        Where another processor left none of the allowed tokens, these are all equally likely: the constraint wins.

        Raises:
            ValueError: the rows cannot be shared out among the constraints.
        """
        table = self._table(scores.device)
        num_rows = input_ids.shape[0]
        starts = self._starts(table, num_rows)
        dynamic = self._dynamic_rows(num_rows)
        ended = self._dynamic.enter(input_ids, dynamic) if dynamic else []
        states, over = self._states(table, input_ids, starts, all(ended))
        if dynamic and all(ended) and bool(over):
            self._dynamic.restart()
        masked = mask_and_keep_alive(table, scores, states) if len(dynamic) < num_rows else scores
        return self._dynamic.masks(scores.device).masked(masked, may_be_lost=True) if dynamic else masked

    def _states(
        self, table: MaskTable, input_ids: Tensor, starts: Tensor, others_ended: bool
    ) -> tuple[Tensor, Tensor | bool]:
        """The automata's states, and whether the rows are the prompts of another call."""
        ids = input_ids.long()
        whose = torch.arange(len(ids), device=ids.device) // (len(ids) // len(self._fsms)) * _MULTIPLIER
        before = _hash(ids[:, :-1]) + whose
        if self._memory is None or self._memory.device != ids.device:
            self._memory = _Memory(ids.device)
        found, known = self._memory.find(before)
        states = torch.where(found, table.advance(known, ids[:, -1]), starts)
        # A call ends when all its rows are done: rows that go on from there are the prompts of another.
        over = ((states == DONE) | (states == FREE)).all() if others_ended else False
        states = torch.where(over, starts, states) if others_ended else states
        self._memory.add(_hash(ids) + whose, states)
        return states, over

    def _dynamic_rows(self, num_rows: int) -> dict[int, tuple[DynamicGrammar, int]]:
        """The rows of dynamic constraints, and each one's constraint with its number."""
        each = num_rows // len(self._fsms)
        found = {i: (self._fsms[i // each], i // each) for i in range(num_rows)}
        return {i: (fsm, which) for i, (fsm, which) in found.items() if isinstance(fsm, DynamicGrammar)}

    def _starts(self, table: MaskTable, num_rows: int) -> Tensor:
        num = len(self._fsms)
        if num_rows % num:
            raise ValueError(f"{num_rows} rows cannot be shared out among {num} constraints: give one for each prompt")
        starts = torch.tensor(
            [FREE if isinstance(fsm, DynamicGrammar) else table.start(fsm) for fsm in self._fsms], device=table.device
        )
        return starts.repeat_interleave(num_rows // num)

    def _table(self, device: torch.device) -> MaskTable:
        if device not in self._tables:
            eos = self._vocabulary.eos_token_ids
            self._tables[device] = MaskTable(self._vocabulary.size, eos, device)
        return self._tables[device]


class RegexLogitsProcessor(ConstraintLogitsProcessor):
    """Output that `re.fullmatch(pattern, output)` matches; arguments as `ConstraintLogitsProcessor`'s."""

    def __init__(self, pattern: str, tokenizer: Any, **options: Any) -> None:
        super().__init__(Constraint.regex(pattern), tokenizer, **options)


class JSONSchemaLogitsProcessor(ConstraintLogitsProcessor):
    """JSON that a schema allows: a dict, JSON text, pydantic model, dataclass, TypedDict or type.

    `whitespace` is the pattern of what may stand after commas and colons ("": compact text).
    """

    def __init__(self, schema: Any, tokenizer: Any, *, whitespace: str = WHITESPACE, **options: Any) -> None:
        super().__init__(Constraint.json_schema(schema, whitespace), tokenizer, **options)


class ChoiceLogitsProcessor(ConstraintLogitsProcessor):
    """One of some texts."""

    def __init__(self, choices: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(Constraint.choice(choices), tokenizer, **options)


class GrammarLogitsProcessor(ConstraintLogitsProcessor):
    """Texts of a context-free grammar: Lark's notation or GBNF, see `Constraint.grammar`."""

    def __init__(self, grammar: str, tokenizer: Any, **options: Any) -> None:
        super().__init__(Constraint.grammar(grammar), tokenizer, **options)


class _Memory:
    """Hashes of the rows of the last steps, and their states. On the device; nothing is read back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps: list[tuple[Tensor, Tensor]] = []

    def find(self, hashes: Tensor) -> tuple[Tensor, Tensor]:
        """(found [num_rows] bool, state [num_rows]) of each hash, the latest of equal ones."""
        if not self._steps:
            return torch.zeros_like(hashes, dtype=torch.bool), torch.zeros_like(hashes)
        known = torch.cat([h for h, _ in reversed(self._steps)])
        states = torch.cat([s for _, s in reversed(self._steps)])
        equal = hashes[:, None] == known[None]
        return equal.any(dim=1), states[equal.to(torch.uint8).argmax(dim=1)]

    def add(self, hashes: Tensor, states: Tensor) -> None:
        self._steps.append((hashes, states))
        del self._steps[:-_HISTORY]


def _hash(ids: Tensor) -> Tensor:
    """[num_rows] int64 of rows of ids [num_rows, length]: a polynomial in wrapping arithmetic of mixed ids."""
    mixed = (ids + 1) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    positions = torch.arange(ids.shape[1], device=ids.device)
    weights = ((positions + 1) * -7723592293110705685) | 1
    weights = (weights ^ (weights >> 31)) * _MULTIPLIER | 1
    return (mixed * weights).sum(dim=1) + ids.shape[1]
