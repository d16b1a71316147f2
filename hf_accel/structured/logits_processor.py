"""Constraints as logits processors for plain `model.generate(..., logits_processor=[...])`.

A row's state is found again from its token ids: by a hash of all tokens but the last among those of earlier steps. So rows may
be permuted (beams), repeated, or come with lengths that jump (assisted decoding), and one object serves any number of calls.
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
        self._memory: _Memory | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masked scores [num_rows, vocab_size] for rows of token ids [num_rows, length].

        Where another processor left none of the allowed tokens, these are all equally likely: the constraint wins.

        Raises:
            ValueError: the rows cannot be shared out among the constraints, or `max_length` leaves too few tokens.
        """
        table = self._table(scores.device)
        starts = self._starts(table, input_ids.shape[0])
        states, generated, most = self._states(table, input_ids, starts)
        return mask_and_keep_alive(table, scores, states, self._close(table, input_ids, states, generated, most))

    def _states(self, table: MaskTable, input_ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, int]:
        """States and numbers of generated tokens of the rows, [num_rows] each, and the most that any can have generated."""
        ids = input_ids.long()
        before = _hash(ids[:, :-1])
        if self._memory is None or self._memory.device != ids.device:
            self._memory = _Memory(ids.device)
        found, known, generated = self._memory.find(before)
        states = torch.where(found, table.advance(known, ids[:, -1]), starts)
        generated = torch.where(found, generated + 1, 0)
        # A call ends when all its rows are done: rows that go on from there are the prompts of another.
        over = (states == DONE).all()
        states, generated = torch.where(over, starts, states), torch.where(over, 0, generated)
        return states, generated, self._memory.add(_hash(ids), states, generated, ids.shape[1])

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


class _Memory:
    """Hashes of the rows of the last steps, their states and how much they have generated. On the device; nothing is read back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps: list[tuple[Tensor, Tensor]] = []  # [num_rows] hashes, [num_rows, (state, generated)]
        self._most: list[tuple[int, int]] = []  # of each step: length of its rows, most that any can have generated

    def find(self, hashes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(found [num_rows] bool, state [num_rows], generated [num_rows]) of each hash, the latest of equal ones."""
        if not self._steps:
            zeros = torch.zeros_like(hashes)
            return zeros.bool(), zeros, zeros
        known = torch.cat([h for h, _ in reversed(self._steps)])
        values = torch.cat([v for _, v in reversed(self._steps)])
        equal = hashes[:, None] == known[None]
        return equal.any(dim=1), *values[equal.to(torch.uint8).argmax(dim=1)].unbind(1)

    def add(self, hashes: Tensor, states: Tensor, generated: Tensor, length: int) -> int:
        """Remember a step of rows of `length` tokens; returns the most that any of them can have generated."""
        most = max((1 + m for n, m in self._most if n == length - 1), default=0)
        self._steps.append((hashes, torch.stack([states, generated], dim=1)))
        self._most.append((length, most))
        del self._steps[:-_HISTORY], self._most[:-_HISTORY]
        return most


def _hash(ids: Tensor) -> Tensor:
    """[num_rows] int64 of rows of ids [num_rows, length]: a polynomial in wrapping arithmetic of mixed ids."""
    mixed = (ids + 1) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    positions = torch.arange(ids.shape[1], device=ids.device)
    weights = ((positions + 1) * -7723592293110705685) | 1
    weights = (weights ^ (weights >> 31)) * _MULTIPLIER | 1
    return (mixed * weights).sum(dim=1) + ids.shape[1]
