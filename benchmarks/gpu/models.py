"""Whole models through the engine: a decode step and a prefill against the least that their bytes and FLOPs take."""

from __future__ import annotations

import statistics

import hf_accel
from benchmarks.gpu import shapes
from benchmarks.gpu.breakdown import profile_steps
from benchmarks.gpu.context import Case, Context
from benchmarks.gpu.steps import Rows, make_engine
from benchmarks.gpu.timing import wall
from benchmarks.models import BenchmarkModel

CONTEXT, PREFILL = 1024, 8192
STEPS, WARM_STEPS, STRETCHES, PROFILED_STEPS = 32, 8, 3, 8
KERNELS_SHOWN = 8
FLAGSHIP = "llama-3-8b"


def cases(ctx: Context) -> list[Case]:
    """The model of the targets first."""
    order = (FLAGSHIP, "deepseek-v2-lite", "llama-3.2-1b", "qwen3-0.6b")
    return [Case(name, lambda ctx, name=name: model(ctx, name), limit=120, least=15) for name in order]


def model(ctx: Context, name: str) -> None:
    """Decode at batch 64 and 1, then prefill."""
    bench = shapes.make(name, ctx.device, ctx.dtype, ctx.smoke)
    costs = shapes.costs(bench.model)
    batches = ctx.pick((64, 1), (3, 1))
    engine = make_engine(
        bench.model,
        max_num_seqs=max(batches),
        max_num_batched_tokens=ctx.pick(PREFILL, 64),
        enable_prefix_cache=False,
    )
    try:
        for batch in batches:
            decode(ctx, engine, bench, costs, batch)
        prefill(ctx, engine, bench, costs)
    finally:
        engine.shutdown()


def decode(ctx: Context, engine: hf_accel.Engine, bench: BenchmarkModel, costs: shapes.Costs, batch: int) -> None:
    """Steady steps of `batch` rows in the middle of which the context is `CONTEXT`."""
    steps, warm, profiled = ctx.pick((STEPS, WARM_STEPS, PROFILED_STEPS), (4, 2, 2))
    room = warm + STRETCHES * steps + profiled + 16
    context = ctx.pick(CONTEXT, 48)
    prompt_len = context - room // 2
    model, size = ctx.case, "batch 64" if batch > 1 else "batch 1"
    rows = Rows(engine, [bench.corpus[37 * i : 37 * i + prompt_len] for i in range(batch)], room)
    try:
        ctx.case = f"{model}: prompts of {size}"
        rate = batch * prompt_len / rows.prefill(ctx.device)
        ctx.row("hf_accel", "tokens/s", rate, rounds=1, note=f"{batch} x {prompt_len}, first run")
        rows.decode(warm, ctx.device)
        ctx.case = f"{model}: step, {size}"
        stretches = [rows.decode(steps, ctx.device) for _ in range(STRETCHES)]
        ms = statistics.median(s.ms for s in stretches)
        target = f"llama_8b_step_{64 if batch > 1 else 1}" if model == FLAGSHIP else None
        floor = ctx.floor(*costs.step(batch, context), ms)
        ctx.row(
            "hf_accel", "ms", ms, rounds=STRETCHES, mode="wall", target_name=target, note=f"context {context}", **floor
        )
        if batch > 1:
            idle(
                ctx,
                rows,
                profiled,
                ms,
                [s.idle_share for s in stretches],
                "idle_share_64" if model == FLAGSHIP else None,
            )
    finally:
        ctx.case = model
        rows.close()


def idle(ctx: Context, rows: Rows, num_steps: int, ms: float, shares: list[float | None], target: str | None) -> None:
    """The device's idle share, as the engine counts it and as the profiler sees it, and the kernels of a step.

    The target is judged by the profiler, which knows nothing of the engine; without one, by the engine's own count.
    """
    try:
        found = profile_steps(lambda: rows.decode(num_steps, ctx.device), num_steps, ctx.device)
        reason = "" if found.busy_ms else "the profiler saw no kernels"
    except Exception as error:
        found, reason = None, f"{type(error).__name__}: {error}"
    seen = found is not None and not reason
    known = [share for share in shares if share is not None]
    ctx.row(
        "EngineStats", "idle share", statistics.median(known) if known else None, rounds=len(known),
        target_name=None if seen else target, status="ok" if known else "not there",
        note="" if known else "device_idle_share",
    )  # fmt: skip
    if found is None or reason:
        ctx.row("profiler", "idle share", status="not there", note=reason)
        return
    note = f"busy {found.busy_ms:.3g} ms"
    ctx.row("profiler", "idle share", found.idle_share(ms), rounds=1, target_name=target, note=note)
    ctx.case += ", kernels"
    for name, kernel_ms in found.kernels.most_common(KERNELS_SHOWN):
        ctx.row(name, "ms", kernel_ms, share=kernel_ms / found.busy_ms, rounds=num_steps)


def prefill(ctx: Context, engine: hf_accel.Engine, bench: BenchmarkModel, costs: shapes.Costs) -> None:
    """One long prompt and one token of answer; each round another prompt."""
    length, rounds = ctx.pick((PREFILL, 4), (64, 2))
    params = hf_accel.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    taken = []
    for number in range(rounds):
        prompt = bench.corpus[101 * number : 101 * number + length]
        seconds, _ = wall(lambda prompt=prompt: engine.generate([prompt], params, use_tqdm=False), ctx.device)
        taken.append(seconds)
    ms = 1000 * statistics.median(taken[1:])
    case, ctx.case = ctx.case, f"{ctx.case}: prefill"
    floor = ctx.floor(*costs.prefill(length), ms)
    ctx.row("hf_accel", "ms", ms, rounds=rounds - 1, mode="wall", note=f"{length} tokens", **floor)
    ctx.row("hf_accel", "tokens/s", 1000 * length / ms, rounds=rounds - 1, mode="wall")
    ctx.case = case
