"""Chooses the next token of each row from its logits, by the engine's own SamplingParams.

Owns the order in which parameters act. Knows neither requests nor schedules: a row brings everything it needs.
Device-agnostic torch. `begin` queues the work and waits for nothing; one copy to the host serves the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_accel.engine.constraints import ConstrainedRows
from hf_accel.engine.device_sampling import choose
from hf_accel.engine.dynamic_rows import mask_dynamic
from hf_accel.engine.inverse_cdf import invert, uniform
from hf_accel.engine.logits_edits import SamplingRow, edit, is_edited
from hf_accel.engine.logits_filters import filter_logits
from hf_accel.engine.sampled import SampledBatch, SampledToken, TokenLogprobs, why_invalid
from hf_accel.engine.upload import upload

_CPU_CHUNK = 1 << 17  # elements of the logits that are worked on at once


class Sampler:
    """Samples a batch of rows, each by its own parameters.

    On a row act, in this order: `logits_processors`, `logit_bias`, `repetition_penalty` (prompt and output, as HF's),
    `presence_penalty` and `frequency_penalty` (output, as OpenAI's), `min_tokens`, then argmax for greedy rows, or
    temperature, top-k, top-p and min-p (as HF's, in its order) and a draw, among the tokens that the row's constraint allows. A draw depends on the row's seed, its position
    and its own distribution, not on what else is in the batch.
    """

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], *, owned: bool = False) -> list[SampledToken]:
        """Choose one token for each row.

        Args:
            logits: [num_rows, vocab_size] float32, any device; not changed, unless they are `owned`.
            rows: one for each row of `logits`, in order.
            owned: as in `begin`.

        Returns:
            One result for each row. NaN logits, a distribution with no token left, or an exception in a row's own
            processor is that row's `error`.
        """
        assert logits.dim() == 2 and logits.shape[0] == len(rows)
        if logits.device.type == "cpu" and all(row.params.plain_greedy and row.constraint is None for row in rows):
            return _greedy_on_host(logits)
        return self.begin(logits, rows, [len(row.token_ids) for row in rows], owned=owned).finish()

    def begin(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        lengths: Sequence[int],
        *,
        ahead: bool = False,
        owned: bool = False,
    ) -> SampledBatch:
        """Queue the choice of one token for each row; on CUDA this waits for nothing (a row's own processor may).

        Args:
            logits: as in `sample`.
            rows: as in `sample`.
            lengths: how many tokens stand before each row's choice, those included that the host does not know yet.
            ahead: the next choice of these rows may be queued before their `token_ids` have this one: count it now.
            owned: `logits` may be written: nobody reads them afterwards.
        """
        assert logits.dim() == 2 and logits.shape[0] == len(rows) == len(lengths)
        errors: dict[int, Exception] = {}
        edited = [i for i, (row, length) in enumerate(zip(rows, lengths, strict=True)) if is_edited(row, length)]
        scores = logits
        if edited:
            edits = {i: _edit_or_fail(logits[i], rows[i], lengths[i], i, errors) for i in edited}
            scores = _with_edited(logits, edits)
        constrained = ConstrainedRows.among(rows, lengths, logits.device)
        if constrained is not None:
            in_place = owned and not any(row.params.logprobs is not None for row in rows)
            scores = constrained.masked(scores, may_be_lost=bool(edited), in_place=in_place)
        scores = mask_dynamic(scores, rows, lengths, errors, bool(edited))
        token_ids, valid = _choose(scores, rows, lengths)
        if constrained is not None:
            constrained.advance(token_ids)
        if ahead:
            for i in edited:
                if rows[i].penalised and i not in errors:
                    rows[i].count(token_ids[i : i + 1])
        wanted = {i: n for i, row in enumerate(rows) if (n := row.params.logprobs) is not None}
        logprobs = None
        if wanted:
            own, chosen = _take(logits, list(wanted)), _take(token_ids, list(wanted))
            logprobs = TokenLogprobs.of(own, chosen, max(wanted.values()))
        return SampledBatch(token_ids, valid, logits, errors=errors, wanted=wanted, logprobs=logprobs)


def _with_edited(logits: Tensor, scores: dict[int, Tensor]) -> Tensor:
    """[num_rows, vocab_size]: `logits` with some rows in the form that they were edited to."""
    stacked = torch.stack(list(scores.values()))
    if len(scores) == logits.shape[0]:
        return stacked
    return logits.index_copy(0, upload(list(scores), torch.long, logits.device), stacked)


def _take(values: Tensor, indices: list[int]) -> Tensor:
    """Rows of `values`; itself for all of them."""
    if len(indices) == values.shape[0]:
        return values
    return values.index_select(0, upload(indices, torch.long, values.device))


# -- choosing --


def _choose(scores: Tensor, rows: Sequence[SamplingRow], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[num_rows] int64 token ids, and [num_rows] bool: whether the choice is a valid one."""
    if scores.device.type == "cuda":
        numbers = [0.0 if row.params.greedy else uniform(row.seed, n) for row, n in zip(rows, lengths, strict=True)]
        return choose(scores, [row.params for row in rows], numbers)
    greedy = [i for i, row in enumerate(rows) if row.params.greedy]
    if len(greedy) == len(rows):
        return _argmax(scores)
    sampled = [i for i, row in enumerate(rows) if not row.params.greedy]
    drawn = _draw(_take(scores, sampled), [rows[i] for i in sampled], [lengths[i] for i in sampled])
    if not greedy:
        return drawn
    index = upload([*greedy, *sampled], torch.long, scores.device)
    parts = zip(_argmax(_take(scores, greedy)), drawn, strict=True)
    token_ids, valid = (torch.cat(pair) for pair in parts)
    return torch.empty_like(token_ids).index_copy_(0, index, token_ids), torch.empty_like(valid).index_copy_(
        0, index, valid
    )


def _greedy_on_host(logits: Tensor) -> list[SampledToken]:
    """Plain argmax of CPU logits, what most steps need: between two forwards every torch call costs a cold start."""
    values = logits.detach().numpy()  # [num_rows, vocab_size]
    token_ids = values.argmax(axis=-1).tolist()
    return [
        SampledToken(token_id) if row[token_id] > -math.inf else SampledToken(-1, error=why_invalid(float(row.max())))
        for row, token_id in zip(values, token_ids, strict=True)  # NaN > -inf is False
    ]


def _argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    token_ids = _first_of_highest(scores)
    best = scores.gather(1, token_ids[:, None])[:, 0]
    return token_ids, best > -torch.inf  # NaN > -inf is False


def _first_of_highest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`: [num_rows]; the first of equals, NaN counts as the highest.

    On CPU through numpy, whose argmax is vectorised (over ten times as fast) and has the same rules.
    """
    if scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))


def _draw(scores: Tensor, rows: Sequence[SamplingRow], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Filter and draw in torch ops, a few rows at a time, so that the intermediate results stay in the cache."""
    num_rows, vocab_size = scores.shape
    step = max(_CPU_CHUNK // vocab_size, 1) if scores.device.type == "cpu" else num_rows
    numbers = [[uniform(row.seed, length)] for row, length in zip(rows, lengths, strict=True)]
    drawn = []
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        probs = filter_logits(scores[part], [row.params for row in rows[part]]).softmax(dim=-1)
        drawn.append(invert(probs, upload(numbers[part], torch.float64, scores.device)))
    token_ids, valid = (drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim=1)).unbind(0)
    return token_ids, valid


def _edit_or_fail(logits: Tensor, row: SamplingRow, length: int, index: int, errors: dict[int, Exception]) -> Tensor:
    """The row's edited logits; after an exception, which is noted, zeros."""
    try:
        return edit(logits.clone(), row, length)
    except Exception as error:
        errors[index] = error
        return torch.zeros_like(logits)
