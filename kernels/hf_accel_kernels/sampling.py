"""Choosing tokens from a batch of logits, each row by its own numbers: the typed contract, its checks, which form computes it.

A row's choice depends on its own logits, settings and number only: not on what else is in the batch, nor on its place there.
Knows tensors only: no seeds, no requests.
"""

from __future__ import annotations

import torch

from .token_bitmask import apply_token_bitmask, check_token_bitmask
from .triton_ops.launch import why_not

LOWEST_TEMPERATURE = 1e-6  # rows below it are greedy


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    bitmask: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row: the first of the highest, or filtered as HuggingFace's warpers do and drawn. No host sync.

    Token masks, temperature, top-k, top-p, min-p act in this order. Top-k keeps all that tie with the k-th; of tokens that tie
    where top-p cuts, the last are kept, as a stable ascending sort does. The draw is the first token at which the sum of kept
    probabilities, in the order of the vocabulary, exceeds the row's number. Sums are rounded as float32 ones: only a set's edge
    or a number that is within that of a sum can fall the other way than in exact arithmetic.

    Args:
        logits: [num_rows, vocab_size] float32, bfloat16 or float16, last axis dense; read.
        temperature: [num_rows] float32; below 1e-6 the row is greedy.
        top_k: [num_rows] int32; 0, or vocab_size and more: off.
        top_p: [num_rows] float32 in (0, 1]; 1: off.
        min_p: [num_rows] float32 in [0, 1]; 0: off.
        uniform: [num_rows] float64 in [0, 1).
        bitmask, mask_rows: as `token_bitmask.apply_token_bitmask` has them, applied while the logits are read.

    Returns:
        token_ids [num_rows] int64 and valid [num_rows] bool: False, with token 0, where the logits have a NaN or nothing
        above -inf, or +inf in a row that is not greedy (once over the temperature).

    Raises:
        ValueError: shapes, dtypes, layouts or devices disagree.
    """
    _check_logits(logits, bitmask, mask_rows)
    settings = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "uniform": (uniform, torch.float64),
    }
    for name, (values, dtype) in settings.items():
        _check_rows(name, values, dtype, logits)
    numbers = (temperature, top_k, top_p, min_p, uniform)
    if why_not(logits.device):
        return _sample_in_torch(_masked(logits, bitmask, mask_rows), *numbers)
    from .triton_ops import sampling

    result = sampling.sample(logits, *numbers, bitmask, mask_rows)
    return result.token_ids, result.valid


def argmax(
    logits: torch.Tensor, *, bitmask: torch.Tensor | None = None, mask_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` where all rows are greedy, which the caller must know: the first of the highest logits. No host sync.

    Returns:
        token_ids [num_rows] int64 and valid [num_rows] bool, as `sample`.

    Raises:
        ValueError: shapes, dtypes, layouts or devices disagree.
    """
    _check_logits(logits, bitmask, mask_rows)
    if why_not(logits.device):
        return _argmax_in_torch(_masked(logits, bitmask, mask_rows))
    from .triton_ops import argmax

    return argmax.argmax(logits, bitmask, mask_rows)


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, top_n: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of one token of each row, and of its `top_n` likeliest, likeliest first. No host sync.

    Args:
        logits: [num_rows, vocab_size] float32, bfloat16 or float16, last axis dense.
        token_ids: [num_rows] int64, each in [0, vocab_size).
        top_n: how many of the likeliest to report; more than there are tokens: all.

    Returns:
        own [num_rows] float32, values [num_rows, top_n] float32, ids [num_rows, top_n] int64.

    Raises:
        ValueError: shapes, dtypes, layouts or devices disagree.
    """
    _check_logits(logits, None, None)
    _check_rows("token_ids", token_ids, torch.int64, logits)
    if why_not(logits.device):
        log_total = logits.float().logsumexp(dim=-1)
        own = logits.gather(1, token_ids[:, None])[:, 0].float() - log_total
    else:
        from .triton_ops import argmax

        own, log_total = argmax.logprobs(logits, token_ids)
    values, ids = logits.topk(min(max(top_n, 0), logits.shape[1]), dim=-1)
    return own, values.float() - log_total[:, None], ids


def _check_logits(logits: torch.Tensor, bitmask: torch.Tensor | None, mask_rows: torch.Tensor | None) -> None:
    if logits.ndim != 2 or not logits.is_floating_point() or logits.stride(1) != 1 or logits.shape[1] == 0:
        raise ValueError(f"logits must be floats [num_rows, vocab_size], dense in the last axis, got {logits.shape}")
    if bitmask is not None:
        check_token_bitmask(logits, bitmask, mask_rows)
    elif mask_rows is not None:
        raise ValueError("mask_rows must come with a bitmask")


def _check_rows(name: str, values: torch.Tensor, dtype: torch.dtype, logits: torch.Tensor) -> None:
    num_rows = logits.shape[0]
    if values.shape != (num_rows,) or values.dtype != dtype or values.device != logits.device:
        got = f"{tuple(values.shape)} {values.dtype} on {values.device}"
        raise ValueError(f"{name} must be {dtype} [{num_rows}] on {logits.device}, got {got}")
    if not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


# -- the torch form --


def _masked(logits: torch.Tensor, bitmask: torch.Tensor | None, mask_rows: torch.Tensor | None) -> torch.Tensor:
    if bitmask is None:
        return logits
    logits = logits.clone()
    apply_token_bitmask(logits, bitmask, mask_rows)
    return logits


def _argmax_in_torch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    token_ids = logits.argmax(dim=-1)
    valid = (
        logits.gather(1, token_ids[:, None])[:, 0] > -torch.inf
    )  # NaN counts as the highest, and NaN > -inf is False
    return token_ids.where(valid, 0), valid


def _sample_in_torch(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    vocab_size = logits.shape[1]
    best, best_valid = _argmax_in_torch(logits)
    greedy = temperature < LOWEST_TEMPERATURE
    scores = logits.float() / temperature.where(~greedy, 1.0)[:, None]
    ascending, order = scores.sort(dim=-1, stable=True)
    k = top_k.where((top_k > 0) & (top_k < vocab_size), vocab_size).long()[:, None]
    ascending = ascending.masked_fill(ascending < ascending.gather(1, vocab_size - k), -torch.inf)
    probs = ascending.double().softmax(dim=-1)
    dropped = (probs.cumsum(dim=-1) <= (1.0 - top_p.double())[:, None]) & (top_p < 1.0)[:, None]
    dropped[:, -1] = False
    probs = probs.masked_fill(dropped, 0.0)
    probs = probs.masked_fill(probs < min_p[:, None] * probs[:, -1:], 0.0)
    up_to = torch.zeros_like(probs).scatter(1, order, probs).cumsum(dim=-1)
    total = up_to[:, -1:]
    goal = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token_ids = torch.searchsorted(up_to, goal, right=True)[:, 0]
    valid = total[:, 0] > 0  # NaN > 0 is False
    return best.where(greedy, token_ids.where(valid, 0)), best_valid.where(greedy, valid)
