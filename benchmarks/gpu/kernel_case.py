"""What a kernel benchmark is: a problem with its bytes and FLOPs, and the forms that solve it. Checks them and times them.

To add a kernel: a function of the context that returns a `Problem`, and a line in `kernels.CASES`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.context import Context, NotThere
from benchmarks.gpu.isolation import describe
from benchmarks.gpu.timing import Call, time_call

MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative L2 error against the torch form: a few roundings of the output's dtype."""


@dataclass
class Form:
    """One way of computing.

    Attributes:
        call: computes on input set i.
        result: what is compared, from set 0; `call(0)`'s own by default. Named for ops that write in place.
        capture: whether it may be captured into a CUDA graph (no host sync inside).
    """

    call: Call
    result: Callable[[], torch.Tensor] | None = None
    capture: bool = True


@dataclass
class Problem:
    """What all forms compute.

    Attributes:
        num_bytes: read and written at least, by one call.
        flops: at least.
        sets: input sets to rotate over.
        reference: the answer on set 0, by plain torch ops.
        judge: error of a result; by default relative L2 for floats, share of unequal elements for others.
        limit: largest error that is right; by default that of the result's dtype, 0 for integers.
    """

    num_bytes: float
    flops: float
    sets: int
    reference: Callable[[], torch.Tensor]
    judge: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    limit: float | None = None
    makers: dict[str, Callable[[], Form]] = field(default_factory=dict)

    def form(self, name: str) -> Callable[[Callable[[], Form]], Callable[[], Form]]:
        """Decorator: register what makes a form; it may raise ImportError, AttributeError or NotThere."""

        def register(make: Callable[[], Form]) -> Callable[[], Form]:
            self.makers[name] = make
            return make

        return register


def find(module: str, name: str) -> Any:
    """An op by name. Raises NotThere."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotThere(f"{module}.{name}: {error}") from error


def with_hints(op: Callable[..., Any], **hints: Any) -> Callable[..., Any]:
    """The op with those of the hints (host-known bounds of a step) that its signature has."""
    known = inspect.signature(op).parameters
    return functools.partial(op, **{name: value for name, value in hints.items() if name in known})


def error_of(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 for floats, share of unequal elements for others; inf where shapes differ or infinities do."""
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return float((got != wanted).float().mean())
    got, wanted = got.float(), wanted.float()
    finite = wanted.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(got[~finite], wanted[~finite]):
        return float("inf")
    got, wanted = got[finite], wanted[finite]
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def measure(ctx: Context, problem: Problem, target: str = "") -> None:
    """A row for every form: its error against the reference, its time against the floor."""
    wanted = problem.reference()
    if wanted.is_floating_point() and wanted.isnan().any():
        raise AssertionError("the reference itself is NaN")
    limit = problem.limit
    if limit is None:
        limit = MAX_ERROR.get(wanted.dtype, 0.0) if wanted.is_floating_point() else 0.0
    for name, make in problem.makers.items():
        try:
            form = make()
            got = form.result() if form.result else form.call(0)
            error = (problem.judge or error_of)(got, wanted)
            del got
            timing = time_call(form.call, problem.sets, ctx.device, seconds=ctx.pick(0.25, 0.01), capture=form.capture)
        except (NotThere, ImportError, AttributeError) as reason:
            ctx.row(name, "ms", status="not there", note=str(reason)[:200])
        except Exception as reason:
            if "CUDA error" in str(reason):  # nothing after it would be right
                raise
            ctx.row(name, "ms", status="failed", note=describe(reason))
        else:
            ctx.row(
                name, "ms", timing.ms, error=error, rounds=timing.rounds, mode=timing.mode, target_name=target or None,
                status="ok" if error <= limit else "wrong", **ctx.floor(problem.num_bytes, problem.flops, timing.ms),
            )  # fmt: skip
