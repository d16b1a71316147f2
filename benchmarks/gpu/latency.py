"""Time to the first token and between tokens under a stream of requests that arrive by chance, at shares of the capacity."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import hf_accel
from benchmarks.gpu import shapes
from benchmarks.gpu.context import Case, Context
from benchmarks.gpu.steps import make_engine, new_tokens
from benchmarks.gpu.timing import synchronize

MODEL = "llama-3.2-1b"
PERCENTILES = (50, 95, 99)


@dataclass
class Arrival:
    """A request: when it comes, counted from the start of the stream, and when its tokens were seen."""

    prompt: list[int]
    max_tokens: int
    at: float
    seen: list[float] = field(default_factory=list)


def cases(ctx: Context) -> list[Case]:
    """One: the capacity must be known before a share of it is asked for."""
    return [Case("stream", stream, limit=90, least=12)]


def stream(ctx: Context) -> None:
    """Everything at once first, which gives the capacity; then Poisson arrivals at shares of it."""
    bench = shapes.make(MODEL, ctx.device, ctx.dtype, ctx.smoke)
    engine = make_engine(bench.model, max_num_batched_tokens=ctx.pick(2048, 64))
    try:
        count = ctx.pick(160, 6)
        serve(ctx, engine, arrivals(ctx, bench.corpus, count, None, seed=1))
        engine.flush_cache()
        burst = arrivals(ctx, bench.corpus, count, None, seed=2)
        seconds = serve(ctx, engine, burst)
        rate = count / seconds
        ctx.case = "all at once"
        ctx.row("hf_accel", "requests/s", rate, rounds=1, mode="wall", note=f"{count} requests, {MODEL}")
        report(ctx, burst)
        for load in ctx.pick((0.5, 0.8), (0.8,)):
            if ctx.remaining < 1.5 * count / (load * rate):
                ctx.case = f"load {load}"
                ctx.row("hf_accel", "ms", status="skipped", note=f"{ctx.remaining:.0f} s left")
                continue
            engine.flush_cache()
            sent = arrivals(ctx, bench.corpus, count, load * rate, seed=3)
            serve(ctx, engine, sent)
            ctx.case = f"load {load}"
            report(ctx, sent)
    finally:
        engine.shutdown()
        ctx.case = "stream"


def arrivals(ctx: Context, corpus: list[int], count: int, rate: float | None, seed: int) -> list[Arrival]:
    """Requests with prompts of 100 to 1000 tokens and 32 to 192 new ones; all at once without a rate."""
    draw, now, made = random.Random(seed), 0.0, []
    (low, high), (few, many) = ctx.pick(((100, 1000), (32, 192)), ((3, 20), (3, 6)))
    for _ in range(count):
        now += draw.expovariate(rate) if rate else 0.0
        length = draw.randint(low, high)
        start = draw.randrange(len(corpus) - length)
        made.append(Arrival(corpus[start : start + length], draw.randint(few, many), now))
    return made


def serve(ctx: Context, engine: Any, requests: list[Arrival]) -> float:
    """Add requests when they are due and step between; seconds until the last one ended."""
    waiting = list(requests)
    running: dict[int, Arrival] = {}
    synchronize(ctx.device)
    start = time.perf_counter()
    while waiting or running:
        now = time.perf_counter() - start
        while waiting and waiting[0].at <= now:
            due = waiting.pop(0)
            params = hf_accel.SamplingParams(temperature=0.0, max_tokens=due.max_tokens, ignore_eos=True)
            running[engine.add_request(due.prompt, params)] = due
        if not running:
            time.sleep(max(0.0, waiting[0].at - now))
            continue
        ended = {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
        now = time.perf_counter() - start
        for request_id, request in list(running.items()):
            count = ended.get(request_id)
            count = len(new_tokens(engine, request_id)) if count is None else count
            request.seen += [now] * (count - len(request.seen))
            if request_id in ended:
                del running[request_id]
    return time.perf_counter() - start


def report(ctx: Context, requests: list[Arrival]) -> None:
    """Percentiles of both times, in milliseconds."""
    short = [r for r in requests if len(r.seen) != r.max_tokens]
    first = [1000 * (r.seen[0] - r.at) for r in requests if r.seen]
    between = [1000 * (b - a) for r in requests for a, b in zip(r.seen, r.seen[1:], strict=False)]
    for what, values in (("ttft", first), ("itl", between)):
        values.sort()
        for percent in PERCENTILES:
            value = values[min(len(values) - 1, percent * len(values) // 100)]
            ctx.row(
                "hf_accel", f"{what} p{percent} ms", value, rounds=len(values), mode="wall",
                status="wrong" if short else "ok", note=f"{len(short)} requests fell short" if short else "",
            )  # fmt: skip
