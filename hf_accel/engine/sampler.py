"""Chooses the next token of each row from its logits, by the engine's own SamplingParams.

Owns the order in which parameters act, and which error is whose. Knows neither requests nor schedules:
a row brings everything it needs. Device-agnostic torch; one copy to the host for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_accel.engine.device_sampling import choose
from hf_accel.engine.inverse_cdf import invert, uniform
from hf_accel.engine.logits_filters import filter_logits
from hf_accel.sampling_params import SamplingParams

_CPU_CHUNK = 1 << 17  # elements of the logits that are worked on at once


@dataclass
class SamplingRow:
    """One row of the batch.

    Attributes:
        params: what to sample.
        token_ids: prompt and output so far; not copied, not changed.
        num_prompt_tokens: how many of them are the prompt.
        seed: with the number of tokens so far, it determines the row's random number.
        eos_token_ids: ids that end the request (empty when it ignores eos); masked until `min_tokens`.

    A row that is kept from step to step, while its `token_ids` grow at the end, counts only the new tokens for penalties.
    """

    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    _counts: _TokenCounts | None = field(default=None, repr=False, compare=False)

    @property
    def below_min_tokens(self) -> bool:
        """Whether the request may not end yet."""
        return len(self.token_ids) - self.num_prompt_tokens < self.params.min_tokens


@dataclass
class SampledToken:
    """What became of one row.

    Attributes:
        token_id: the token, or -1 with an error.
        logprob: its log-probability in the model's own distribution: before temperature, penalties and every other
            parameter. None unless `params.logprobs` asks for it.
        top_logprobs: the so many likeliest tokens of that distribution, likeliest first. None unless asked for.
        error: why there is no token; the row's alone.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    error: Exception | None = None


class InvalidLogits(ValueError):
    """The model's own logits of a row are NaN or infinite."""


class Sampler:
    """Samples a batch of rows, each by its own parameters.

    On a row act, in this order: `logits_processors`, `logit_bias`, `repetition_penalty` (prompt and output, as HF's),
    `presence_penalty` and `frequency_penalty` (output, as OpenAI's), `min_tokens`, then argmax for greedy rows, or
    temperature, top-k, top-p and min-p (as HF's, in its order) and a draw. A draw depends on the row's seed, its position
    and its own distribution, not on what else is in the batch.
    """

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Choose one token for each row.

        Args:
            logits: [num_rows, vocab_size] float32, any device; not changed.
            rows: one for each row of `logits`, in order.

        Returns:
            One result for each row. NaN logits, a distribution with no token left, or an exception in a row's own
            processor is that row's `error`.
        """
        assert logits.dim() == 2 and logits.shape[0] == len(rows)
        if logits.device.type == "cpu" and all(row.params.plain_greedy for row in rows):
            return _greedy_on_host(logits)
        errors: dict[int, Exception] = {}
        edited = [i for i, row in enumerate(rows) if _is_edited(row)]
        plain = [i for i, row in enumerate(rows) if not _is_edited(row)]
        chosen: list[Tensor] = []  # each [2, num_rows of the group]: token id, whether it is valid
        if plain:
            chosen.append(_choose(_take(logits, plain), [rows[i] for i in plain]))
        if edited:
            scores = torch.stack([_edit_or_fail(logits[i], rows[i], i, errors) for i in edited])
            chosen.append(_choose(scores, [rows[i] for i in edited]))
        if not chosen:
            return []
        token_ids, valid = torch.cat(chosen, dim=1).tolist()
        results: list[SampledToken] = [SampledToken(-1)] * len(rows)
        for i, token_id, is_valid in zip([*plain, *edited], token_ids, valid, strict=True):
            error = errors.get(i) or (None if is_valid else _invalid(logits[i]))
            results[i] = SampledToken(-1, error=error) if error else SampledToken(token_id)
        _add_logprobs(logits, rows, results)
        return results


def logprobs_of(logits: Tensor, token_ids: Sequence[int], top_n: int) -> list[tuple[float, dict[int, float]]]:
    """Log-probabilities of given tokens in the model's own distribution, and of the `top_n` likeliest ones.

    Args:
        logits: [num_rows, vocab_size] float32.
        token_ids: one for each row.
        top_n: how many of the likeliest to report, likeliest first; 0: none.
    """
    if not token_ids:
        return []
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    ids = torch.tensor(token_ids).to(logits.device)[:, None]
    own = (logits.gather(1, ids) - log_total)[:, 0].tolist()
    if top_n <= 0:
        return [(logprob, {}) for logprob in own]
    values, indices = logits.topk(min(top_n, logits.shape[1]), dim=-1)
    top = zip(indices.tolist(), (values - log_total).tolist())
    return [(logprob, dict(zip(*pair))) for logprob, pair in zip(own, top)]


# -- choosing --


def _take(logits: Tensor, indices: list[int]) -> Tensor:
    return logits if len(indices) == logits.shape[0] else logits[torch.tensor(indices, device=logits.device)]


def _choose(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """[2, num_rows] int64: the token of each row, and 1 where the choice is a valid one."""
    if scores.device.type == "cuda":
        return torch.stack(choose(scores, [row.params for row in rows], _numbers(rows)))
    greedy = [i for i, row in enumerate(rows) if row.params.greedy]
    if len(greedy) == len(rows):
        return _argmax(scores)
    sampled = [i for i, row in enumerate(rows) if not row.params.greedy]
    drawn = _draw(_take(scores, sampled), [rows[i] for i in sampled])
    if not greedy:
        return drawn
    result = torch.empty(2, len(rows), dtype=torch.long, device=scores.device)
    result[:, greedy] = _argmax(_take(scores, greedy))
    result[:, sampled] = drawn
    return result


def _greedy_on_host(logits: Tensor) -> list[SampledToken]:
    """Plain argmax of CPU logits, what most steps need: between two forwards every torch call costs a cold start."""
    values = logits.detach().numpy()  # [num_rows, vocab_size]
    token_ids = values.argmax(axis=-1).tolist()
    return [
        SampledToken(token_id) if row[token_id] > -math.inf else SampledToken(-1, error=_invalid(logits[i]))
        for i, (row, token_id) in enumerate(zip(values, token_ids, strict=True))  # NaN > -inf is False
    ]


def _argmax(scores: Tensor) -> Tensor:
    token_ids = _first_of_highest(scores)
    best = scores.gather(1, token_ids[:, None])[:, 0]
    return torch.stack([token_ids, best > -torch.inf])  # NaN > -inf is False


def _first_of_highest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`: [num_rows]; the first of equals, NaN counts as the highest.

    On CPU through numpy, whose argmax is vectorised (over ten times as fast) and has the same rules.
    """
    if scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Filter and draw; on CPU a few rows at a time, so that the intermediate results stay in the cache."""
    num_rows, vocab_size = scores.shape
    step = max(_CPU_CHUNK // vocab_size, 1) if scores.device.type == "cpu" else num_rows
    numbers = _numbers(rows)
    drawn = []
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        probs = filter_logits(scores[part], [row.params for row in rows[part]]).softmax(dim=-1)
        drawn.append(invert(probs, torch.tensor(numbers[part], dtype=torch.float64)[:, None].to(scores.device)))
    return torch.cat(drawn, dim=1)


def _numbers(rows: Sequence[SamplingRow]) -> list[float]:
    return [0.0 if row.params.greedy else uniform(row.seed, len(row.token_ids)) for row in rows]


def _invalid(logits: Tensor) -> ValueError:
    """Why nothing could be chosen from what became of the model's `logits` [vocab_size]."""
    if bool(logits.isnan().any()):
        return InvalidLogits(
            "the model produced NaN logits for this request: look for NaN in its weights, or run it in a wider dtype"
        )
    if not bool(logits.isfinite().any()) or bool(logits.isposinf().any()):
        return InvalidLogits("the model produced infinite logits for this request: run it in a wider dtype")
    return ValueError(
        "no token can be sampled: after logits_processors, logit_bias, penalties and min_tokens every logit is -inf or "
        "NaN; let at least one token through"
    )


# -- editing one row's logits --


def _is_edited(row: SamplingRow) -> bool:
    params = row.params
    return (
        bool(params.logits_processors)
        or bool(params.logit_bias)
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or row.below_min_tokens
    )


def _edit_or_fail(logits: Tensor, row: SamplingRow, index: int, errors: dict[int, Exception]) -> Tensor:
    """The row's edited logits; after an exception, which is noted, zeros."""
    try:
        return _edit(logits.clone(), row)
    except Exception as error:
        errors[index] = error
        return torch.zeros_like(logits)


def _edit(scores: Tensor, row: SamplingRow) -> Tensor:
    """Apply everything that changes single logits; `scores` [vocab_size] is the row's own copy."""
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
        scores[_ids(params.logit_bias, scores)] += scores.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1.0:
        penalised = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
        scores = torch.where(_counted(row, scores).seen, penalised, scores)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        num_output = _counted(row, scores).num_output
        scores -= params.frequency_penalty * num_output + params.presence_penalty * (num_output > 0)
    if row.below_min_tokens:
        scores[_ids({*row.eos_token_ids, *params.stop_token_ids}, scores)] = -torch.inf
    return scores


class _TokenCounts:
    """Which tokens a row has seen, and how often in its output, up to `num_tokens`."""

    def __init__(self, like: Tensor) -> None:
        self.num_tokens = 0
        self.seen = torch.zeros_like(like, dtype=torch.bool)  # [vocab_size], prompt and output
        self.num_output = torch.zeros_like(like)  # [vocab_size]


def _counted(row: SamplingRow, scores: Tensor) -> _TokenCounts:
    """The row's counts, brought up to date."""
    counts = row._counts
    if counts is None or counts.num_tokens > len(row.token_ids) or counts.seen.device != scores.device:
        counts = row._counts = _TokenCounts(scores)
    if counts.num_tokens < len(row.token_ids):
        counts.seen[_ids(row.token_ids[counts.num_tokens :], scores)] = True
        output = _ids(row.token_ids[max(counts.num_tokens, row.num_prompt_tokens) :], scores)
        counts.num_output.index_add_(0, output, torch.ones_like(output, dtype=scores.dtype))
        counts.num_tokens = len(row.token_ids)
    return counts


def _ids(token_ids: Iterable[int], scores: Tensor) -> Tensor:
    """The ids that have a logit: a vocabulary may be padded, or have ids for the prompt only."""
    return torch.tensor([i for i in token_ids if i < scores.shape[0]], dtype=torch.long).to(scores.device)


def _check_ids(token_ids: Iterable[int], vocab_size: int) -> None:
    wrong = [i for i in token_ids if not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(f"logit_bias names token id {wrong[0]}; this model's ids are 0 to {vocab_size - 1}")


def _add_logprobs(logits: Tensor, rows: Sequence[SamplingRow], results: list[SampledToken]) -> None:
    wanted = {i: n for i, row in enumerate(rows) if (n := row.params.logprobs) is not None and not results[i].error}
    if not wanted:
        return
    found = logprobs_of(_take(logits, list(wanted)), [results[i].token_id for i in wanted], max(wanted.values()))
    for (i, top_n), (logprob, top) in zip(wanted.items(), found, strict=True):
        results[i].logprob = logprob
        results[i].top_logprobs = dict(list(top.items())[:top_n])
