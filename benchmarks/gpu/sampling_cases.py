"""Choosing tokens from a batch of logits, and token masks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu import flashinfer_forms
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernel_case import Form, Problem, find
from benchmarks.gpu.timing import num_sets
from hf_accel_kernels import token_bitmask

ROWS, VOCAB = 64, 128256
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95


def _logits(ctx: Context) -> torch.Tensor:
    """[sets, rows, vocab] float32, as a step hands them over."""
    rows, vocab = ctx.pick((ROWS, VOCAB), (4, 500))
    sets = num_sets(4 * rows * vocab, ctx.device)
    return torch.empty(sets, rows, vocab, device=ctx.device).normal_(0, 3)


def greedy(ctx: Context) -> Problem:
    """The highest of each row."""
    x = _logits(ctx)
    problem = Problem(x[0].nbytes, 0, x.shape[0], reference=lambda: x[0].argmax(-1))

    @problem.form("hf_accel")
    def ours() -> Form:
        argmax = find("hf_accel_kernels.sampling", "argmax")
        return Form(lambda i: argmax(x[i])[0])

    problem.form("torch")(lambda: Form(lambda i: x[i].argmax(-1)))
    return problem


def filtered(ctx: Context, top_k: int, top_p: float) -> Problem:
    """Temperature, top-k and top-p. Random numbers differ by form, so a token is judged by whether the filters keep it."""
    x = _logits(ctx)
    rows = x.shape[1]

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=x.device)

    def outside(got: torch.Tensor, kept: torch.Tensor) -> float:
        return float((~kept.gather(1, got.long()[:, None])).float().mean())

    problem = Problem(
        x[0].nbytes, 0, x.shape[0], reference=lambda: kept_probs(x[0], top_k, top_p) > 0, judge=outside, limit=0.02
    )

    @problem.form("hf_accel")
    def ours() -> Form:
        sample = find("hf_accel_kernels.sampling", "sample")
        settings = (full(TEMPERATURE, torch.float32), full(top_k, torch.int32), full(top_p, torch.float32))
        last = (full(0, torch.float32), torch.rand(rows, dtype=torch.float64, device=x.device))
        return Form(lambda i: sample(x[i], *settings, *last)[0])

    @problem.form("flashinfer")
    def theirs() -> Form:
        flashinfer = flashinfer_forms.library(x.device)
        limits = {"top_k": full(top_k or x.shape[2], torch.int32), "top_p": full(top_p, torch.float32)}
        choose = flashinfer.sampling.top_k_top_p_sampling_from_logits
        return Form(lambda i: choose(x[i] / TEMPERATURE, **limits, filter_apply_order="top_k_first"))

    @problem.form("torch")
    def plain() -> Form:
        def call(i: int) -> torch.Tensor:
            probs = kept_probs(x[i], top_k, top_p)
            return (probs / torch.empty_like(probs).exponential_()).argmax(-1)

        return Form(call)

    return problem


def kept_probs(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities of what the filters keep, 0 elsewhere, by a sort of the whole row."""
    scores = logits / TEMPERATURE
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    ascending, order = scores.softmax(-1).sort(dim=-1, stable=True)
    if top_p < 1:
        ascending = ascending.masked_fill(ascending.cumsum(-1) <= 1 - top_p, 0)
    return torch.zeros_like(ascending).scatter_(1, order, ascending)


def bitmask(ctx: Context, dtype: torch.dtype) -> Problem:
    """One packed mask a row that allows one token in eight, in place."""
    x = _logits(ctx).to(dtype)
    sets, rows, vocab = x.shape
    words = [
        torch.randint(-(1 << 31), 1 << 31, (rows, -(-vocab // 32)), dtype=torch.int32, device=x.device) for _ in "123"
    ]
    masks = words[0] & words[1] & words[2]
    num_bytes = masks.nbytes + x[0].nbytes  # each sector is written: one token in eight leaves none whole

    def in_torch(logits: torch.Tensor) -> None:
        bits = (masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=x.device)) & 1
        logits.masked_fill_(bits.flatten(1)[:, :vocab] == 0, -torch.inf)

    def on_copy(apply: Callable[[torch.Tensor], None]) -> torch.Tensor:
        logits = x[0].clone()
        apply(logits)
        return logits

    problem = Problem(num_bytes, 0, sets, reference=lambda: on_copy(in_torch), limit=0.0)

    @problem.form("hf_accel")
    def ours() -> Form:
        def call(logits: torch.Tensor) -> None:
            token_bitmask.apply_token_bitmask(logits, masks)

        return Form(lambda i: call(x[i]), result=lambda: on_copy(call))

    problem.form("torch")(lambda: Form(lambda i: in_torch(x[i]), result=lambda: on_copy(in_torch)))
    return problem
