"""Slow and plain forms of the sampling ops, one token at a time in Python's floats: what tests compare with."""

from __future__ import annotations

import math

import torch


def kept_tokens(scores: list[float], top_k: int, top_p: float, min_p: float) -> tuple[list[int], float]:
    """Tokens that the filters keep of a row's scores (float32 values over the temperature), and how near a sum came to an edge.

    The nearness is a share of the whole probability: where it is no more than rounding, another order of summation may keep
    another set.
    """
    ascending = sorted(range(len(scores)), key=lambda i: scores[i])  # stable
    if 0 < top_k < len(scores):
        ascending = [i for i in ascending if scores[i] >= scores[ascending[-top_k]]]
    highest = scores[ascending[-1]]
    weights = {i: math.exp(scores[i] - highest) for i in ascending}
    total = math.fsum(weights.values())
    nearest = math.inf
    if top_p < 1.0:
        dropped, kept = 0.0, list(ascending)
        for i in ascending[:-1]:
            dropped += weights[i]
            nearest = min(nearest, abs(dropped / total - (1.0 - top_p)))
            if dropped / total > 1.0 - top_p:
                break
            kept.remove(i)
        ascending = kept
    if min_p > 0.0:
        nearest = min([nearest, *(abs(weights[i] - min_p) for i in ascending if weights[i] < 1.0)])
    return sorted(i for i in ascending if weights[i] >= min_p), nearest


def draw(scores: list[float], kept: list[int], uniform: float) -> tuple[int, float]:
    """The first kept token at which the sum of probabilities exceeds `uniform`, and how near a sum came to it."""
    highest = max(scores[i] for i in kept)
    weights = [math.exp(scores[i] - highest) for i in kept]
    total = math.fsum(weights)
    sums = [math.fsum(weights[: i + 1]) / total for i in range(len(kept))]
    nearest = min(abs(x - uniform) for x in sums)
    return next((i for i, x in zip(kept, sums, strict=True) if x > uniform), kept[-1]), nearest


def is_valid(logits: list[float], greedy: bool) -> bool:
    """Whether a token can be chosen from a row."""
    return (
        not any(map(math.isnan, logits))
        and max(logits) > -math.inf
        and (greedy or max(logits) < math.inf)
    )  # fmt: skip


def logprob(logits: list[float], token_id: int) -> float:
    """Log-probability of a token."""
    highest = max(logits)
    return logits[token_id] - highest - math.log(math.fsum(math.exp(x - highest) for x in logits))


def edit_logits(
    logits: torch.Tensor,
    prompt: list[list[int]],
    output: list[list[int]],
    repetition: list[float],
    presence: list[float],
    frequency: list[float],
    bias: list[dict[int, float]],
    banned: list[list[int]],
) -> torch.Tensor:
    """[num_rows, vocab_size] float64: what `penalties.edit_logits` makes of `logits`, from the rows' very tokens."""
    edited = logits.double()
    for row, scores in enumerate(edited):
        for token, value in bias[row].items():
            scores[token] += value
        for token in {*prompt[row], *output[row]}:
            scores[token] *= repetition[row] if scores[token] < 0 else 1 / repetition[row]
        for token in set(output[row]):
            scores[token] -= presence[row] + frequency[row] * output[row].count(token)
        for token in banned[row]:
            scores[token] = -torch.inf
    return edited
