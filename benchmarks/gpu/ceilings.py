"""What the card itself reaches: copies, reads, large GEMMs, and the linears of a decode step. The floors come from these."""

from __future__ import annotations

import torch

from benchmarks.gpu.context import Case, Context
from benchmarks.gpu.timing import num_sets, time_call

LLAMA_MLP = (28672, 4096)
"""gate and up of Llama-3-8B as one matrix."""


def cases(ctx: Context) -> list[Case]:
    """Copy and GEMM first: everything else is divided by them."""
    return [
        Case("copy", copy),
        Case("gemm", gemm),
        Case("read", read),
        *(Case(f"linear, {rows} rows", lambda ctx, rows=rows: linear(ctx, rows)) for rows in (1, 64)),
    ]


def copy(ctx: Context) -> None:
    """Bytes read and written a second, by the fastest of torch's forms."""
    source, target = _gigabyte(ctx), _gigabyte(ctx)
    calls = {"copy_": lambda i: target.copy_(source), "add": lambda i: torch.add(source, 1, out=target)}
    for name, call in calls.items():
        call(0)
        timing = time_call(call, 1, ctx.device, seconds=ctx.pick(0.5, 0.02))
        rate = 2 * source.nbytes / timing.ms * 1000
        ctx.ceilings.copy = max(ctx.ceilings.copy, rate)
        ctx.row(name, "GB/s", rate / 1e9, rounds=timing.rounds, mode=timing.mode)


def read(ctx: Context) -> None:
    """Bytes read a second by reductions."""
    source = _gigabyte(ctx)
    for name, call in {"sum": lambda i: source.sum(), "amax": lambda i: source.amax()}.items():
        call(0)
        timing = time_call(call, 1, ctx.device, seconds=ctx.pick(0.3, 0.02))
        rate = source.nbytes / timing.ms * 1000
        ctx.row(name, "GB/s", rate / 1e9, rounds=timing.rounds, mode=timing.mode, share=rate / ctx.ceilings.copy)


def gemm(ctx: Context) -> None:
    """TFLOPS of a square product, at the clock that a second of it leaves."""
    n = ctx.pick(8192, 256)
    a, b = (torch.randn(n, n, device=ctx.device, dtype=ctx.dtype) for _ in range(2))
    out = torch.empty_like(a)

    def call(i: int) -> torch.Tensor:
        return torch.mm(a, b, out=out)

    call(0)
    timing = time_call(call, 1, ctx.device, seconds=ctx.pick(1.0, 0.02), max_rounds=500)
    rate = 2 * n**3 / timing.ms * 1000
    ctx.ceilings.gemm = max(ctx.ceilings.gemm, rate)
    ctx.row("torch.mm", "TFLOPS", rate / 1e12, rounds=timing.rounds, mode=timing.mode, note=f"{n} x {n}, {ctx.dtype}")


def linear(ctx: Context, rows: int) -> None:
    """A few rows through a large weight, against its bytes: what the linears of a decode step can reach."""
    outputs, inputs = ctx.pick(LLAMA_MLP, (64, 32))
    sets = max(2, num_sets(outputs * inputs * 2, ctx.device))
    weights = torch.randn(sets, outputs, inputs, device=ctx.device, dtype=ctx.dtype)
    x = torch.randn(rows, inputs, device=ctx.device, dtype=ctx.dtype)

    def call(i: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[i])

    call(0)
    timing = time_call(call, sets, ctx.device, seconds=ctx.pick(0.3, 0.02))
    num_bytes = weights[0].nbytes + x.nbytes + rows * outputs * x.itemsize
    floor = ctx.floor(num_bytes, 2 * rows * outputs * inputs, timing.ms)
    ctx.row("F.linear", "ms", timing.ms, rounds=timing.rounds, mode=timing.mode, **floor)


def _gigabyte(ctx: Context) -> torch.Tensor:
    return torch.zeros(ctx.pick(1 << 28, 1 << 16), device=ctx.device, dtype=torch.float32)
