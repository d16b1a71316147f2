"""Constraints of a `generate` call that the engine applies itself, row by row, instead of calling their logits processor.

Owns when that gives what the processor would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers.generation import LogitsProcessorList

from hf_accel.engine.engine import Engine
from hf_accel.structured.compiler import Compiled
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor
from hf_accel.structured.vocabulary import Vocabulary


class ConstraintOfRow(NamedTuple):
    """What a row's output must satisfy, the vocabulary that it was compiled for, and the tokens within which the output must be
    complete (None: it may be cut off)."""

    compiled: Compiled
    vocabulary: Vocabulary
    max_output: int | None


Constraints = Sequence[ConstraintOfRow | None]
"""One for each row of a call; None for a free one."""


def constraints_of(
    engine: Engine, processors: LogitsProcessorList, input_ids: torch.Tensor, eos: frozenset[int]
) -> Constraints | None:
    """The constraints to run a call's rows under in place of its processors; None where these must be called.

    Args:
        engine: runs the call.
        processors: all that HF would call, its own included.
        input_ids: [num_rows, length].
        eos: ids that end a row of this call.

    Raises:
        ValueError: the rows cannot be shared out among the constraints, or no output is complete within its budget.
    """
    if not processors:
        return [None] * input_ids.shape[0]
    processor = processors[0]
    if len(processors) > 1 or not _is_plain(processor):
        return None
    same_ends = set(processor.vocabulary.eos_token_ids) <= eos  # else a complete text would not end its row
    fits = processor.vocabulary.size <= engine.core.executor.runner.spec.vocab_size
    if not same_ends or not fits or not processor.begins(input_ids):
        return None
    each, most = processor.compiled(input_ids.shape[0]), processor.max_output(input_ids.shape[1])
    return [None if one is None else ConstraintOfRow(one, processor.vocabulary, most) for one in each]


def note_unfinished(processors: LogitsProcessorList, sequences: torch.Tensor, num_prompt_tokens: int) -> None:
    """Let a later call with the same processor go on from these rows [num_rows, length], as HF's would."""
    for processor in processors:
        processor.was_applied(sequences, num_prompt_tokens)


def _is_plain(processor: object) -> bool:
    """Whether it does what our class does: a subclass may have a `__call__` of its own."""
    return (
        isinstance(processor, ConstraintLogitsProcessor)
        and type(processor).__call__ is ConstraintLogitsProcessor.__call__
    )
