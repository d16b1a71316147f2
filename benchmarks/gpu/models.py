"""Whole models through the engine: a decode step and a prefill against the least that their bytes and FLOPs take."""

from __future__ import annotations

import statistics

import hf_accel
from benchmarks.gpu import shapes
from benchmarks.gpu.context import Case, Context
from benchmarks.gpu.steps import Rows, make_engine
from benchmarks.gpu.timing import wall

CONTEXT, PREFILL = 1024, 8192
STEPS, WARM_STEPS, STRETCHES = 32, 8, 3
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


def decode(
    ctx: Context, engine: hf_accel.Engine, bench: shapes.BenchmarkModel, costs: shapes.Costs, batch: int
) -> None:
    """Steady steps of `batch` rows in the middle of which the context is `CONTEXT`."""
    steps, warm = ctx.pick((STEPS, WARM_STEPS), (4, 2))
    room = warm + STRETCHES * steps + 8
    context = ctx.pick(CONTEXT, 48)
    prompt_len = context - room // 2
    starts = [37 * i for i in range(batch)]
    rows = Rows(engine, [bench.corpus[s : s + prompt_len] for s in starts], room)
    case, share = ctx.case, "batch 64" if batch > 1 else "batch 1"
    try:
        ctx.case = f"{case}: prompts of {share}"
        seconds = rows.prefill(ctx.device)
        ctx.row(
            "hf_accel", "tokens/s", batch * prompt_len / seconds, rounds=1, note=f"{batch} x {prompt_len}, first run"
        )
        rows.decode(warm, ctx.device)
        stretches = [rows.decode(steps, ctx.device) for _ in range(STRETCHES)]
    finally:
        rows.close()
        ctx.case = case
    ms = statistics.median(s.ms for s in stretches)
    target = f"llama_8b_step_{64 if batch > 1 else 1}" if case == FLAGSHIP else None
    ctx.case = f"{case}: step, {share}"
    ctx.row(
        "hf_accel", "ms", ms, rounds=STRETCHES, mode="wall", target_name=target, note=f"context {context}",
        **ctx.floor(*costs.step(batch, context), ms),
    )  # fmt: skip
    idle = [s.idle_share for s in stretches if s.idle_share is not None]
    if batch > 1:
        ctx.row(
            "hf_accel", "idle share", statistics.median(idle) if idle else None, rounds=len(idle),
            target_name="idle_share_64" if case == FLAGSHIP else None,
            status="ok" if idle else "not there", note="" if idle else "EngineStats.device_idle_share",
        )  # fmt: skip
    ctx.case = case


def prefill(ctx: Context, engine: hf_accel.Engine, bench: shapes.BenchmarkModel, costs: shapes.Costs) -> None:
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
