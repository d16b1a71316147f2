"""Temperature, top-k, top-p and min-p on a batch with one setting per row, keeping the very sets HF's warpers keep.

Owns the rules and their order (HF's: temperature, top-k, top-p, min-p). Knows nothing about requests or random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_accel.engine.upload import upload
from hf_accel.sampling_params import SamplingParams

_NUM_CANDIDATES = 256  # tokens looked at before the whole vocabulary is sorted for top-p
_ROUNDING = 1e-5  # nearer than this to top_p, a sum of float32 probabilities depends on the order of its terms


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores to sample from: divided by the temperature, -inf for every token that a filter drops.

    Args:
        logits: [num_rows, vocab_size] float32; not changed.
        params: one for each row, none of them greedy.

    Returns:
        [num_rows, vocab_size] float32; `logits` itself when no row asks for anything.
    """
    scores = logits
    if any(p.temperature != 1.0 for p in params):
        scores = logits / _column([p.temperature for p in params], logits)
    vocab_size = logits.shape[1]
    scores = _on_rows(scores, _top_k, {i: p.top_k for i, p in enumerate(params) if 0 < p.top_k < vocab_size})
    scores = _on_rows(scores, _top_p, {i: p.top_p for i, p in enumerate(params) if p.top_p < 1.0})
    return _on_rows(scores, _min_p, {i: p.min_p for i, p in enumerate(params) if p.min_p > 0.0})


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, like.dtype, like.device)[:, None]  # [num_rows, 1]


def _on_rows(scores: Tensor, rule: Callable[[Tensor, list[float]], Tensor], values: dict[int, float]) -> Tensor:
    """Apply a rule to the rows that have a value for it."""
    if not values:
        return scores
    if len(values) == scores.shape[0]:
        return rule(scores, list(values.values()))
    rows = upload(list(values), torch.long, scores.device)
    return scores.index_copy(0, rows, rule(scores.index_select(0, rows), list(values.values())))


def _top_k(scores: Tensor, values: list[float]) -> Tensor:
    """Keep what is not below the k-th highest score: ties with it stay."""
    ks = upload(values, torch.long, scores.device)
    highest = scores.topk(int(max(values)), dim=-1).values
    return scores.masked_fill(scores < highest.gather(1, ks[:, None] - 1), -torch.inf)


def _top_p(scores: Tensor, values: list[float]) -> Tensor:
    """Keep the likeliest tokens until their probability reaches p, the one that reaches it included."""
    if scores.device.type != "cpu":  # a full sort is cheap there, looking at the result is not
        return _top_p_by_sorting(scores, values)
    lowest, clear = _top_p_among_candidates(scores, values)
    if all(clear):
        return scores.masked_fill(scores < lowest, -torch.inf)
    rest = {i: values[i] for i, is_clear in enumerate(clear) if not is_clear}
    # Rows that are not clear have a meaningless `lowest`: they are computed anew from the scores.
    kept = scores.masked_fill(scores < lowest, -torch.inf)
    rows = torch.tensor(list(rest))
    return kept.index_copy(0, rows, _top_p_by_sorting(scores.index_select(0, rows), list(rest.values())))


def _top_p_by_sorting(scores: Tensor, values: list[float]) -> Tensor:
    """HF's rule to the letter: drop, from the least likely on, while the sum of what is dropped is at most 1 - p."""
    ascending, order = scores.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= _column([1 - p for p in values], scores)
    drop[:, -1] = False
    return scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)


def _top_p_among_candidates(scores: Tensor, values: list[float]) -> tuple[Tensor, list[bool]]:
    """The lowest kept score of each row [num_rows, 1], and whether it is beyond doubt that HF keeps the same tokens.

    In doubt: the candidates do not reach p, the sum comes as near to p as rounding does, or a dropped token ties with the
    lowest kept one (which of them HF keeps is up to its sort).
    """
    num_candidates = min(_NUM_CANDIDATES, scores.shape[1])
    top = scores.topk(num_candidates, dim=-1).values  # [num_rows, num_candidates], descending
    log_total = scores.logsumexp(dim=-1, keepdim=True)
    up_to = (top - log_total).exp().cumsum(dim=-1, dtype=torch.float64)
    goal = torch.tensor(values, dtype=torch.float64)[:, None]
    num_kept = (up_to < goal).sum(dim=-1, keepdim=True) + 1
    reached = num_kept <= num_candidates
    lowest = top.gather(1, num_kept.clamp(max=num_candidates) - 1)
    doubtful = ((up_to - goal).abs() < _ROUNDING).any(dim=-1, keepdim=True)
    tied = (scores >= lowest).sum(dim=-1, keepdim=True) != num_kept
    clear = reached & ~doubtful & ~tied
    return lowest, clear[:, 0].tolist()


def _min_p(scores: Tensor, values: list[float]) -> Tensor:
    """Keep what is at least min_p times as likely as the likeliest token."""
    probs = scores.softmax(dim=-1)
    floor = _column(values, scores) * probs.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probs < floor, -torch.inf)
