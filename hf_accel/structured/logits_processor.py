"""Constraints as logits processors for plain `model.generate(..., logits_processor=[...])`.

A row's state is found again from its token ids: all of them but the last are those of a row of an earlier step. So rows may
be permuted (beams), repeated, or come with lengths that jump (assisted decoding), and one object serves any number of calls, from
any number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_accel.structured.call_memory import CallHistory, UnfinishedRows
from hf_accel.structured.closing import Closing, check_budget
from hf_accel.structured.compiler import Compiled, compiler_for
from hf_accel.structured.constraint import WHITESPACE, Constraint
from hf_accel.structured.dynamic import DynamicGrammar
from hf_accel.structured.jump_forward import GrammarMatcher
from hf_accel.structured.mask_table import DONE, FREE, MaskTable, mask_and_keep_alive
from hf_accel.structured.row_memory import row_hashes
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import TokenFsm
from hf_accel.structured.vocabulary import Vocabulary

_THREADS = 256  # whose steps are
_making_tables = threading.Lock()


class ConstraintLogitsProcessor:
    """Lets through only tokens with which the generated text can still satisfy its constraint.

    Args:
        constraints: one for all rows, or one for each row of the batch (a row's samples and beams share its own); None leaves
            a row free. Whatever `Constraint.of` reads.
        tokenizer: a fast HF tokenizer.
        eos_token_ids: ids that may end a text that is complete; the tokenizer's by default.
        max_new_tokens: texts are complete, with their end of sequence, within so many generated tokens.
        max_length: the same for prompt (with padding) and output together; as `generate`'s, both of them.

    Raises:
        StructureError: a constraint is not supported, or this vocabulary cannot spell it, or not within `max_new_tokens`.
    """

    def __init__(
        self,
        constraints: Any,
        tokenizer: Any,
        eos_token_ids: Iterable[int] | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
    ) -> None:
        several = constraints if isinstance(constraints, (list, tuple)) else [constraints]
        if not several:
            raise StructureError("the list of constraints is empty: give one (or None) for each prompt")
        self._constraints = [None if c is None else Constraint.of(c) for c in several]
        eos = [tokenizer.eos_token_id] if eos_token_ids is None else list(eos_token_ids)
        compiler = compiler_for(tokenizer, [e for e in eos if e is not None])
        futures = [None if c is None else compiler.submit(c) for c in self._constraints]
        self._fsms = [None if f is None else f.result() for f in futures]
        self._max_new_tokens, self._max_length = max_new_tokens, max_length
        self._check_budget(max_new_tokens)
        self._vocabulary = compiler.vocabulary
        self._tables: dict[torch.device, MaskTable] = {}
        self._closing: dict[torch.device, list[Closing | None]] = {}
        self._histories: dict[int, CallHistory] = {}  # by thread: the steps of one call are all of one
        self._unfinished: UnfinishedRows | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the automata. Ids past it are never allowed."""
        return self._vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masked scores [num_rows, vocab_size] for rows of token ids [num_rows, length].

        Where another processor left none of the allowed tokens, these are all equally likely: the constraint wins.

        Raises:
            ValueError: the rows cannot be shared out among the constraints, or `max_length` leaves too few tokens.
        """
        scores = scores if scores.stride(-1) == 1 else scores.contiguous()
        num_rows, table = input_ids.shape[0], self._table(scores.device)
        starts, dynamic = self._starts(table, num_rows), self._dynamic_rows(num_rows)
        rows = self._history().dynamic
        ended = rows.enter(input_ids, dynamic) if dynamic else []
        states, generated, over = self._states(table, input_ids, starts, all(ended))
        if dynamic and all(ended) and bool(over):
            rows.restart()
        masked = scores
        if len(dynamic) < num_rows:
            masked = mask_and_keep_alive(table, scores, states, self._close(table, input_ids, states, generated))
        return rows.masks(scores.device).masked(masked, may_be_lost=True) if dynamic else masked

    def reset(self) -> None:
        """Forget earlier calls: the next one begins anew, even on rows that an earlier one left unfinished."""
        self._histories, self._unfinished = {}, None

    # ---- for whoever applies the constraints itself --------------------------------------------------------------

    def compiled(self, num_rows: int) -> list[Compiled | None]:
        """The constraint of each row of a batch. Raises ValueError if they cannot be shared out."""
        num = len(self._fsms)
        if num_rows % num:
            raise ValueError(f"{num_rows} rows cannot be shared out among {num} constraints: give one for each prompt")
        return [fsm for fsm in self._fsms for _ in range(num_rows // num)]

    def max_output(self, num_prompt_tokens: int) -> int | None:
        """Tokens within which outputs behind so long prompts (with padding) are complete; None: they may be cut off.

        Raises:
            StructureError: no output is.
        """
        limits = [] if self._max_new_tokens is None else [self._max_new_tokens]
        if self._max_length is not None:
            limits.append(self._max_length - num_prompt_tokens)
            self._check_budget(limits[-1])
        return min(limits, default=None)

    @property
    def is_for_any_row(self) -> bool:
        """Whether all rows have one constraint."""
        return len(self._fsms) == 1

    def begins(self, input_ids: Tensor) -> bool:
        """Whether a call on these prompts [num_rows, length] begins anew: none goes on from a row of an earlier call."""
        left = self._unfinished
        if left is not None and left.holds(input_ids):
            self._recall(left)
        history, dynamic = self._history(), self._dynamic_rows(len(input_ids))
        memory = history.memory(input_ids.device)
        before = row_hashes(input_ids.long()[:, :-1], self._whose(input_ids))
        return not bool(memory.find(before, input_ids.shape[1] - 1)[0].any()) and not (
            dynamic and history.dynamic.knows(input_ids, dynamic)
        )

    def was_applied(self, sequences: Tensor, num_prompt_tokens: int) -> None:
        """Another has generated these rows [num_rows, length] under `compiled`: a later call may go on from them."""
        self._unfinished = UnfinishedRows(sequences, num_prompt_tokens)

    def _recall(self, rows: UnfinishedRows) -> None:
        table, before, self._unfinished = self._table(rows.sequences.device), rows.sequences[:, :-1], None
        outputs = before[:, rows.num_prompt_tokens :].tolist()
        states = [
            table.global_state(fsm, *GrammarMatcher(fsm).follow(output, 0)) if isinstance(fsm, TokenFsm) else FREE
            for fsm, output in zip(self.compiled(len(outputs)), outputs, strict=True)
        ]
        history, dynamic = self._history(), self._dynamic_rows(len(outputs))
        hashes, length = row_hashes(before.long(), self._whose(before)), before.shape[1]
        known, generated = torch.tensor(states, device=before.device), length - rows.num_prompt_tokens
        history.memory(before.device).add(hashes, length, known, torch.full_like(known, generated), generated)
        if dynamic:
            history.dynamic.remember(before, dynamic, rows.num_prompt_tokens)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _states(
        self, table: MaskTable, input_ids: Tensor, starts: Tensor, others_ended: bool
    ) -> tuple[Tensor, Tensor, Tensor | bool]:
        """The automata's states and the numbers of generated tokens, [num_rows] each, and whether the rows are the prompts of
        another call."""
        ids, whose, length = input_ids.long(), self._whose(input_ids), input_ids.shape[1]
        memory = self._history().memory(ids.device)
        found, known, generated = memory.find(row_hashes(ids[:, :-1], whose), length - 1)
        states = torch.where(found, table.advance(known, ids[:, -1]), starts)
        generated = torch.where(found, generated + 1, 0)
        # A call ends when all its rows are done: rows that go on from there are the prompts of another.
        over: Tensor | bool = False
        if others_ended:
            over = ((states == DONE) | (states == FREE)).all()
            states, generated = torch.where(over, starts, states), torch.where(over, 0, generated)
        memory.add(row_hashes(ids, whose), length, states, generated)
        return states, generated, over

    def _close(
        self, table: MaskTable, input_ids: Tensor, states: Tensor, generated: Tensor
    ) -> Callable[[Tensor], None] | None:
        """What forbids tokens that leave too few to end; None while there are enough."""
        if self._max_new_tokens is None and self._max_length is None:
            return None
        length, least = input_ids.shape[1], []  # tokens that are left to the row with the fewest, as the host knows
        most = self._history().memory(input_ids.device).most_generated(length)
        if self._max_new_tokens is not None:
            least.append(self._max_new_tokens - most)
        if self._max_length is not None:
            least.append(self._max_length - length)
            if most == 0:
                self._check_budget(least[-1])
        if table.device not in self._closing:
            self._closing[table.device] = [Closing(f, table) if isinstance(f, TokenFsm) else None for f in self._fsms]
        closing = self._closing[table.device]
        if not any(c is not None and c.may_bind(min(least)) for c in closing):
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
                if one is not None:
                    one.apply(logits[part], states[part], remaining[part])

        return close

    def _check_budget(self, max_new_tokens: int | None) -> None:
        for fsm in self._fsms:
            if fsm is not None and max_new_tokens is not None:
                check_budget(fsm, max_new_tokens)

    def _whose(self, input_ids: Tensor) -> Tensor:
        """[num_rows] int64: tells rows of equal tokens and different constraints apart."""
        each = len(input_ids) // len(self._fsms)
        return torch.arange(len(input_ids), device=input_ids.device) // max(each, 1)

    def _history(self) -> CallHistory:
        """This thread's."""
        known, thread = self._histories, threading.get_ident()
        if thread not in known:
            known[thread] = CallHistory()
            for old in list(known)[:-_THREADS]:
                known.pop(old, None)
        return known[thread]

    def _dynamic_rows(self, num_rows: int) -> dict[int, tuple[DynamicGrammar, int]]:
        """The rows of dynamic constraints, and each one's constraint with its number."""
        each = num_rows // len(self._fsms)
        rows = enumerate(self.compiled(num_rows))
        return {i: (fsm, i // each) for i, fsm in rows if isinstance(fsm, DynamicGrammar)}

    def _starts(self, table: MaskTable, num_rows: int) -> Tensor:
        starts = [table.start(fsm) if isinstance(fsm, TokenFsm) else FREE for fsm in self.compiled(num_rows)]
        return torch.tensor(starts, device=table.device)

    def _table(self, device: torch.device) -> MaskTable:
        with _making_tables:
            if device not in self._tables:
                table = MaskTable(self._vocabulary.size, self._vocabulary.eos_token_ids, device)
                for fsm in self._fsms:
                    if isinstance(fsm, TokenFsm):
                        table.start(fsm)
                self._tables[device] = table  # it does not change any more
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
