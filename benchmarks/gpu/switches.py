"""Overlap and CUDA graphs, each on and off, and attention backends by name: engines side by side on models of the same weights, in interleaved stretches."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from benchmarks.gpu import shapes
from benchmarks.gpu.context import Case, Context
from benchmarks.gpu.steps import Rows, Stretch, make_engine
from hf_accel.config import ATTENTION_BACKENDS, EngineConfig

SWITCHES = ("overlap", "cuda_graphs")
BACKENDS = ("triton", "flashinfer")
STRETCHES, STEPS, CONTEXT = 3, 32, 512


def cases(ctx: Context) -> list[Case]:
    """Batches in which the host's share differs."""
    return [
        Case(f"{name}, batch {batch}", lambda ctx, n=name, b=batch: compare(ctx, n, b), limit=90, least=15)
        for name, batch in (("llama-3.2-1b", 64), ("qwen3-0.6b", 64), ("llama-3.2-1b", 1))
    ]


def variants() -> dict[str, dict[str, Any]]:
    """The engine's own choice, each switch of this checkout off alone, all off, then each attention backend of a GPU."""
    known = {f.name for f in dataclasses.fields(EngineConfig)} & set(SWITCHES)
    have = [name for name in SWITCHES if name in known]
    made: dict[str, dict[str, Any]] = {"default": {}}
    for name in have:
        made[f"no {name}"] = {name: False}
    if len(have) > 1:
        made["off"] = dict.fromkeys(have, False)
    named = [name for name in BACKENDS if name in ATTENTION_BACKENDS]
    return made | {f"attention {name}": {"attention_backend": name} for name in named}


def compare(ctx: Context, name: str, batch: int) -> None:
    """Decode steps of every variant in turn; ratios are those of a round."""
    batch = ctx.pick(batch, 2)
    steps, context = ctx.pick((STEPS, CONTEXT), (3, 16))
    room = (STRETCHES + 1) * steps + 8
    running: dict[str, Rows] = {}
    stretches: dict[str, list[Stretch]] = {}
    for switch in SWITCHES:
        if not any(switch in options for options in variants().values()):
            ctx.row(f"no {switch}", "ms", status="not there", note=f"EngineConfig.{switch}")
    try:
        for variant, options in variants().items():
            bench = shapes.make(name, ctx.device, ctx.dtype, ctx.smoke)
            fixed = {"max_num_seqs": batch, "enable_prefix_cache": False, "memory_fraction": 0.2}
            try:
                engine = make_engine(bench.model, **fixed, **options)
            except ValueError as reason:
                ctx.row(variant, "ms", status="not there", note=str(reason))
                continue
            rows = Rows(engine, [bench.corpus[37 * i : 37 * i + context] for i in range(batch)], room)
            running[variant] = rows
            rows.prefill(ctx.device)
            rows.decode(steps, ctx.device)
        for _ in range(STRETCHES):
            for variant, rows in running.items():
                stretches.setdefault(variant, []).append(rows.decode(steps, ctx.device))
    finally:
        for rows in running.values():
            rows.close()
            rows.engine.shutdown()
    for variant, made in stretches.items():
        idle = [s.idle_share for s in made if s.idle_share is not None]
        share = f", idle share {statistics.median(idle):.3f}" if idle else ""
        ctx.row(
            variant,
            "ms",
            statistics.median(s.ms for s in made),
            rounds=len(made),
            mode="wall",
            note=f"context {context}{share}",
        )
        ratio = statistics.median(s.ms / on.ms for s, on in zip(made, stretches["default"], strict=True))
        if variant != "default":
            ctx.row(variant, "ratio", ratio, rounds=len(made), mode="wall", note="time of a step over the default's")
