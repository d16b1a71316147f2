"""Constraints as logits processors for plain `model.generate(..., logits_processor=[...])`.

A row's state is found again from its token ids: all of them but the last are those of a row of an earlier step. So rows may be
permuted (beams), repeated, or come with lengths that jump (assisted decoding), and one object serves any number of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_accel.structured.closing import Closing, check_budget
from hf_accel.structured.compiler import ConstraintCompiler, cache_folder
from hf_accel.structured.constraint import WHITESPACE, Constraint
from hf_accel.structured.mask_table import DONE, MaskTable, mask_and_keep_alive
from hf_accel.structured.row_memory import RowMemory, row_hashes
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.vocabulary import Vocabulary


class ConstraintLogitsProcessor:
    """Lets through only tokens with which the generated text can still satisfy its constraint.

    Args:
        constraints: one for all rows, or one for each row of the batch (a row's samples and beams share its own).
        tokenizer: a fast HF tokenizer.
        eos_token_ids: ids that may end a text that is complete; the tokenizer's by default.
        max_new_tokens: texts are complete, with their end of sequence, within so many generated tokens.
        max_length: the same for prompt (with padding) and output together; as `generate`'s, both of them.

    Raises:
        StructureError: a constraint is not supported, or this vocabulary cannot spell it, or not within `max_new_tokens`.
    """

    def __init__(
        self,
        constraints: Constraint | Sequence[Constraint],
        tokenizer: Any,
        eos_token_ids: Iterable[int] | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self._constraints = [constraints] if isinstance(constraints, Constraint) else list(constraints)
        eos = [tokenizer.eos_token_id] if eos_token_ids is None else list(eos_token_ids)
        if not eos or None in eos:
            raise StructureError("a constraint needs an end of sequence: give eos_token_ids")
        vocabulary = Vocabulary.of(tokenizer, len(tokenizer), eos)
        compiler = ConstraintCompiler(vocabulary, cache_folder())
        self._fsms = [compiler.compile(c) for c in self._constraints]
        if max_new_tokens is not None:
            for fsm in self._fsms:
                check_budget(fsm, max_new_tokens)
        self._max_new_tokens, self._max_length = max_new_tokens, max_length
        self._vocabulary = vocabulary
        self._tables: dict[torch.device, MaskTable] = {}
        self._closing: dict[torch.device, list[Closing]] = {}
        self._memory: RowMemory | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masked scores [num_rows, vocab_size] for rows of token ids [num_rows, length].

        Where another processor left none of the allowed tokens, these are all equally likely: the constraint wins.

        Raises:
            ValueError: the rows cannot be shared out among the constraints, or `max_length` leaves too few tokens.
        """
        scores = scores if scores.stride(-1) == 1 else scores.contiguous()
        table = self._table(scores.device)
        starts = self._starts(table, input_ids.shape[0])
        states, generated, most = self._states(table, input_ids, starts)
        return mask_and_keep_alive(table, scores, states, self._close(table, input_ids, states, generated, most))

    def _states(self, table: MaskTable, input_ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, int]:
        """States and numbers of generated tokens of the rows, [num_rows] each, and the most that any can have generated."""
        ids, length = input_ids.long(), input_ids.shape[1]
        if self._memory is None or self._memory.device != ids.device:
            self._memory = RowMemory(ids.device)
        most = self._memory.most_generated(length)
        found, known, generated = self._memory.find(row_hashes(ids[:, :-1], starts), length - 1)
        states = torch.where(found, table.advance(known, ids[:, -1]), starts)
        generated = torch.where(found, generated + 1, 0)
        # A call ends when all its rows are done: rows that go on from there are the prompts of another.
        over = (states == DONE).all()
        states, generated = torch.where(over, starts, states), torch.where(over, 0, generated)
        self._memory.add(row_hashes(ids, starts), length, states, generated)
        return states, generated, most

    def _close(
        self, table: MaskTable, input_ids: Tensor, states: Tensor, generated: Tensor, most: int
    ) -> Callable[[Tensor], None] | None:
        """What forbids tokens that leave too few to end; None while there are enough."""
        least: list[int] = []  # tokens that are left
        if self._max_new_tokens is not None:
            least.append(self._max_new_tokens - most)
        if self._max_length is not None:
            least.append(self._max_length - input_ids.shape[1])
            if most == 0:
                for fsm in self._fsms:
                    check_budget(fsm, least[-1])
        if not least:
            return None
        if table.device not in self._closing:
            self._closing[table.device] = [Closing(fsm, table) for fsm in self._fsms]
        closing = self._closing[table.device]
        if not any(c.may_bind(min(least)) for c in closing):
            return None
        remaining = torch.full_like(generated, min(least))
        if self._max_new_tokens is not None:
            remaining = self._max_new_tokens - generated
            if self._max_length is not None:
                remaining = remaining.clamp(max=least[-1])

        def close(logits: Tensor) -> None:
            size = len(logits) // len(closing)
            for i, one in enumerate(closing):
                part = slice(i * size, (i + 1) * size)
                one.apply(logits[part], states[part], remaining[part])

        return close

    def _starts(self, table: MaskTable, num_rows: int) -> Tensor:
        num = len(self._fsms)
        if num_rows % num:
            raise ValueError(f"{num_rows} rows cannot be shared out among {num} constraints: give one for each prompt")
        starts = torch.tensor([table.start(fsm) for fsm in self._fsms], device=table.device)
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
