"""Whole workloads: hf-accel beside HF's padded `generate` and its continuous batching, in interleaved rounds.

Each case is a pair of arms, so that one that hangs or dies leaves the others' figures.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from benchmarks import arms
from benchmarks.gpu import shapes
from benchmarks.gpu.context import Case, Context, known_options
from benchmarks.gpu.timing import wall
from benchmarks.workloads import Generation, Workload, shrunk

MAX_ROUNDS = 3
BATCH_TOKENS = (512, 2048)
"""`max_batch_tokens` of `generate_batch` that are tried; the faster one is measured."""
SMOKE_BATCH_TOKENS = (64, 96)


class Ours(arms.HFAccel):
    """Default options, and room on the card for the other arm."""

    config: ClassVar[dict[str, Any]] = known_options(memory_fraction=0.35)


def cases(ctx: Context) -> list[Case]:
    """Pairs by value; the workload's model in words with it."""
    made = []
    for workload, other in (
        ("nano", "generate_batch_padded"),
        ("nano", "generate_batch"),
        ("prefix", "generate_batch"),
        ("prefix", "generate_batch_padded"),
        ("turns", "generate_batch"),
        ("turns", "generate_batch_padded"),
    ):
        run = lambda ctx, workload=workload, other=other: pair(ctx, workload, other)  # noqa: E731
        made.append(
            Case(
                f"{workload} vs {other.removeprefix('generate_batch_')}",
                run,
                limit=110,
                least=20 if ctx.device.type == "cuda" else 2,
            )
        )
    return made


def nano(draw: Draw, smoke: bool) -> Workload:
    """nano-vllm's bench at half its lengths: 256 requests, prompts and outputs of 100 to 512 tokens; greedy here."""
    count, low, high = (5, 3, 12) if smoke else (256, 100, 512)
    stage = tuple(Generation(draw.tokens(draw.length(low, high)), draw.length(low, high)) for _ in range(count))
    return Workload("nano", (stage,))


def prefix(draw: Draw, smoke: bool) -> Workload:
    """64 prompts that share 2048 tokens, 128 of their own, 128 new ones."""
    count, shared, own, new = (4, 40, 6, 5) if smoke else (64, 2048, 128, 128)
    common = draw.tokens(shared)
    return Workload("prefix", (tuple(Generation(common + draw.tokens(own), new) for _ in range(count)),))


def turns(draw: Draw, smoke: bool) -> Workload:
    """32 conversations of 4 turns in lock step: 256 tokens in, 128 out, on the whole history."""
    count, own, new = (2, 8, 4) if smoke else (32, 256, 128)
    stages = [
        tuple(Generation(draw.tokens(own), new, count * (turn - 1) + i if turn else None) for i in range(count))
        for turn in range(2 if smoke else 4)
    ]
    return Workload("turns", tuple(stages))


class Draw:
    """Random slices of a corpus, and lengths."""

    def __init__(self, corpus: list[int], seed: int = 0) -> None:
        self._corpus, self._random = corpus, random.Random(seed)

    def tokens(self, length: int) -> tuple[int, ...]:
        start = self._random.randrange(len(self._corpus) - length)
        return tuple(self._corpus[start : start + length])

    def length(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


WORKLOADS: dict[str, tuple[str, Callable[[Draw, bool], Workload]]] = {
    "nano": ("qwen3-0.6b", nano),
    "prefix": ("llama-3.2-1b", prefix),
    "turns": ("llama-3.2-1b", turns),
}
TARGETS = {
    ("nano", "generate_batch_padded"): "nano_vs_padded",
    ("nano", "generate_batch"): "nano_vs_generate_batch",
    ("prefix", "generate_batch"): "prefix_vs_generate_batch",
}


def pair(ctx: Context, name: str, other: str) -> None:
    """Rounds of both arms in turn; a row of tokens/s for each, and one of the ratio."""
    model, make = WORKLOADS[name]
    plain = shapes.make(model, ctx.device, ctx.dtype, ctx.smoke)
    workload = make(Draw(plain.corpus), ctx.smoke)
    ours = Ours(shapes.make(model, ctx.device, ctx.dtype, ctx.smoke), workload)
    theirs: arms.Arm | None = None
    seconds: dict[str, list[float]] = {"hf_accel": [], other: []}
    outputs: dict[str, list[list[int]]] = {}
    try:
        _run(ctx, ours)  # whatever is compiled or captured at first use
        taken, result = _run(ctx, ours)
        rate = result.num_tokens / taken
        hits = f"{workload.num_generated_tokens} tokens, {model}, hit rate {result.hit_rate:.2f}"
        ctx.row("hf_accel", "tokens/s", rate, rounds=1, mode="wall", note=f"before the pair: {hits}")
        theirs = _padded(ctx, plain, workload) if other == "generate_batch_padded" else _tuned(ctx, plain, workload)
        while len(seconds[other]) < ctx.pick(MAX_ROUNDS, 1):
            start = time.monotonic()
            for arm, key in ((ours, "hf_accel"), (theirs, other)):
                taken, result = _run(ctx, arm)
                seconds[key].append(taken)
                outputs[key] = result.outputs
            if ctx.remaining < time.monotonic() - start:
                break
    finally:
        ours.close()
        if theirs is not None:
            theirs.close()
    _report(ctx, workload, other, seconds, outputs, {"hf_accel": hits, other: theirs.api})
    ctx.row(
        "hf_accel", "ratio", statistics.median(b / a for a, b in zip(seconds["hf_accel"], seconds[other], strict=True)),
        rounds=len(seconds[other]), mode="wall", target_name=TARGETS.get((name, other)), note=f"over {other}",
    )  # fmt: skip


def _report(
    ctx: Context,
    workload: Workload,
    other: str,
    seconds: dict[str, list[float]],
    outputs: dict[str, list[list[int]]],
    notes: dict[str, str],
) -> None:
    wanted = [g.max_new_tokens for g in workload.generations]
    for key, taken in seconds.items():
        got = [len(tokens) for tokens in outputs[key]]
        rate = workload.num_generated_tokens / statistics.median(taken)
        unequal = sum(a != b for a, b in zip(outputs["hf_accel"], outputs[key], strict=True)) / len(wanted)
        exact = ctx.dtype == torch.float32  # in bf16 rounding decides near ties of random weights
        right = got == wanted and not (exact and unequal)
        ctx.row(
            key, "tokens/s", rate, rounds=len(taken), mode="wall", note=notes[key], error=unequal if exact else None,
            status="ok" if right else "wrong",
        )  # fmt: skip


def _run(ctx: Context, arm: arms.Arm) -> tuple[float, arms.RunResult]:
    arm.reset()
    try:
        return wall(arm.run, ctx.device)
    finally:
        arm.pause()


def _padded(ctx: Context, bench: Any, workload: Workload) -> arms.Arm:
    _run(ctx, arms.GeneratePadded(bench, shrunk(workload)))
    return arms.GeneratePadded(bench, workload)


def _tuned(ctx: Context, bench: Any, workload: Workload) -> arms.Arm:
    """Continuous batching with the better of `BATCH_TOKENS`, found on some requests of the first workload that asks."""
    if "batch_tokens" not in ctx.cache:
        stage = workload.stages[0]
        part = Workload(workload.name, (stage[: max(2, len(stage) // 8)],))
        taken: dict[int, float] = {}
        for tokens in ctx.pick(BATCH_TOKENS, SMOKE_BATCH_TOKENS):
            arm = _continuous(ctx, bench, part, tokens)
            try:
                taken[tokens], _ = _run(ctx, arm)
            finally:
                arm.close()
            ctx.row(
                f"max_batch_tokens {tokens}",
                "s",
                taken[tokens],
                rounds=1,
                mode="wall",
                note=f"{len(part.stages[0])} requests",
            )
        ctx.cache["batch_tokens"] = min(taken, key=taken.__getitem__)
    arm = _continuous(ctx, bench, workload, ctx.cache["batch_tokens"])
    return arm


def _continuous(ctx: Context, bench: Any, workload: Workload, tokens: int) -> arms.Arm:
    arm = arms.ContinuousBatching(bench, workload, tokens)
    arm.deadline = time.monotonic() + max(20.0, ctx.remaining)
    return arm
