"""One row of a batch to sample: what it brings, and what its parameters do to single logits before a token is chosen.

Owns the order of these edits, and the counts of a row's tokens. Knows neither requests nor schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_accel.engine.constraints import GuessedState, RowConstraint
from hf_accel.engine.dynamic_rows import DynamicConstraint
from hf_accel.engine.upload import upload
from hf_accel.sampling_params import SamplingParams


@dataclass
class SamplingRow:
    """One row of the batch.

    Attributes:
        params: what to sample.
        token_ids: prompt and output so far; not copied, not changed.
        num_prompt_tokens: how many of them are the prompt.
        seed: with the number of tokens so far, it determines the row's random number.
        eos_token_ids: ids that end the request (empty when it ignores eos); masked until `min_tokens`.
        constraint: what its output must satisfy.

    A row that is kept from step to step, while its `token_ids` grow at the end, counts only the new tokens for penalties.
    """

    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    constraint: RowConstraint | GuessedState | DynamicConstraint | None = None
    _counts: _TokenCounts | None = field(default=None, repr=False, compare=False)

    def below_min_tokens(self, length: int) -> bool:
        """Whether the request may not end yet at `length` tokens."""
        return length - self.num_prompt_tokens < self.params.min_tokens

    @property
    def penalised(self) -> bool:
        """Whether the row's own tokens change its logits."""
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    def settle(self) -> None:
        """All of the row's tokens are known: what was derived from them may be looked at by the thread that samples."""
        if isinstance(self.constraint, RowConstraint):
            self.constraint.settle(self.token_ids)

    def after(self, draft: Sequence[int]) -> list[SamplingRow]:
        """The row as it is after the first, the first two, ... of some guesses: one row for each guess.

        Only for rows whose own tokens change nothing but the state of their constraint.
        """
        if not draft:
            return []
        assert self.constraint is not None and not self.penalised and not self.params.logits_processors
        return [
            SamplingRow(self.params, [], self.num_prompt_tokens, self.seed, self.eos_token_ids, constraint)
            for constraint in self.constraint.after(self.token_ids, draft)
        ]

    def count(self, token_id: Tensor) -> None:
        """Count a token [1] int64 on the device, which `token_ids` will have later. Nobody but the sampler knows it yet."""
        assert self._counts is not None, "a penalised row was counted before its token was chosen"
        self._counts.add(token_id, 1, output=token_id)


def is_edited(row: SamplingRow, length: int) -> bool:
    """Whether `edit` would change the row's logits at `length` tokens."""
    params = row.params
    return bool(params.logits_processors) or bool(params.logit_bias) or row.penalised or row.below_min_tokens(length)


def edit(scores: Tensor, row: SamplingRow, length: int) -> Tensor:
    """Apply everything that changes single logits.

    Args:
        scores: [vocab_size] float32, the row's own copy.
        row: whose.
        length: how many tokens stand before the one to choose: those of the row, and those counted by `count`.
    """
    params, vocab_size = row.params, scores.shape[0]
    for processor in params.logits_processors:
        result = processor(list(row.token_ids), scores)
        if not isinstance(result, Tensor) or result.shape != (vocab_size,):
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"a logits processor must return a tensor of shape ({vocab_size},), got {shape}")
        if result is not scores:  # it may be a tensor that the processor keeps
            scores = result.to(device=scores.device, dtype=scores.dtype, copy=True)
    if params.logit_bias:
        _check_ids(params.logit_bias, vocab_size)
        bias = upload(list(params.logit_bias.values()), scores.dtype, scores.device)
        scores.index_add_(0, _ids(params.logit_bias, scores), bias)
    if params.repetition_penalty != 1.0:
        penalised = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
        scores = torch.where(_counted(row, scores, length).seen, penalised, scores)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        num_output = _counted(row, scores, length).num_output
        scores -= params.frequency_penalty * num_output + params.presence_penalty * (num_output > 0)
    if row.below_min_tokens(length):
        scores.index_fill_(0, _ids({*row.eos_token_ids, *params.stop_token_ids}, scores), -torch.inf)
    return scores


class _TokenCounts:
    """Which tokens a row has seen, and how often in its output, up to `num_tokens`."""

    def __init__(self, like: Tensor) -> None:
        self.num_tokens = 0
        self.seen = torch.zeros_like(like, dtype=torch.bool)  # [vocab_size], prompt and output
        self.num_output = torch.zeros_like(like)  # [vocab_size]

    def add(self, token_ids: Tensor, num_tokens: int, output: Tensor) -> None:
        """Take in the next `num_tokens` tokens: those with a logit, and those of the output with a logit."""
        self.seen.index_fill_(0, token_ids, True)
        self.num_output.index_add_(0, output, torch.ones_like(output, dtype=self.num_output.dtype))
        self.num_tokens += num_tokens


def _counted(row: SamplingRow, scores: Tensor, length: int) -> _TokenCounts:
    """The row's counts, brought up to date."""
    counts = row._counts
    if counts is None or counts.num_tokens > length or counts.seen.device != scores.device:
        counts = row._counts = _TokenCounts(scores)
    first = counts.num_tokens
    if first < length:
        new = row.token_ids[first:length]
        assert len(new) == length - first, "a token that is not known yet is counted when it is sampled"
        output = _ids(row.token_ids[max(first, row.num_prompt_tokens) : length], scores)
        counts.add(_ids(new, scores), len(new), output)
    return counts


def _ids(token_ids: Iterable[int], scores: Tensor) -> Tensor:
    """The ids that have a logit: a vocabulary may be padded, or have ids for the prompt only."""
    return upload([i for i in token_ids if i < scores.shape[0]], torch.long, scores.device)


def _check_ids(token_ids: Iterable[int], vocab_size: int) -> None:
    wrong = [i for i in token_ids if not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(f"logit_bias names token id {wrong[0]}; this model's ids are 0 to {vocab_size - 1}")
