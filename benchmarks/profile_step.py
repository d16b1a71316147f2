"""Where a decode step's time goes: scheduler, batch build, forward, sampling, the rest; and HF's own time a step.

    python -m benchmarks.profile_step [--model llama-100m] [--dtypes fp32 bf16] [--batches 1 16]

Wraps the methods of a running engine and times them in thread CPU time. Only pure decode steps over the whole batch count;
a figure is the median over them. The cost of the clock itself is measured and taken off.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import dataclasses
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import hf_accel
from benchmarks import models, results
from benchmarks.results import PROFILE_PARTS as PARTS
from benchmarks.side_by_side import DTYPES
from hf_accel.engine.engine import Engine
from hf_accel_kernels.cpu.abi import fused_library

CSV_PATH = results.PROFILE_CSV_PATH
KEY = ("model", "dtype", "batch", "part")
INSIDE = {
    "native": "forward",
    "sample": "execute",
    "forward": "execute",
    **dict.fromkeys(("schedule", "build", "execute", "update", "on_step"), "step"),
}
"""Part -> the part that contains it; a row of the table is a part without what it contains."""


class StepProfile:
    """Times the parts of an engine's steps; `on` while it lives inside a `with` block."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self._engine, self._batch = engine, batch
        self.steps: list[dict[str, float]] = []
        self._spent: dict[str, float] = defaultdict(float)
        self._undo: list[Callable[[], None]] = []
        self._pure = False
        self._last_end = 0.0
        self._tick = _clock_cost()

    def __enter__(self) -> StepProfile:
        core = self._engine.core
        self._wrap(core.scheduler, "schedule", "schedule", self._saw_schedule)
        self._wrap(core.scheduler, "update", "update")
        self._wrap(core.executor, "build", "build")
        self._wrap(core.executor, "execute", "execute")
        self._wrap(core.executor.runner, "forward", "forward")
        self._wrap(core.executor.sampler, "sample", "sample")
        self._wrap(core._plain, "_on_tokens", "on_step")
        self._wrap(core, "_step", "step", self._saw_step)
        if core.executor.runner.fused:
            self._wrap(fused_library(), "hfa_decoder_forward", "native")
        return self

    def __exit__(self, *exc: object) -> None:
        for undo in self._undo:
            undo()

    def _wrap(self, owner: Any, name: str, part: str, then: Callable[[Any], None] | None = None) -> None:
        method, spent = getattr(owner, name), self._spent

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            if part == "step":
                spent["between"] = began - self._last_end
            result = method(*args, **kwargs)
            spent[part] += time.thread_time() - began
            if then is not None:
                then(result)
            return result

        held = name in vars(owner)
        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, method) if held else delattr(owner, name))

    def _saw_schedule(self, output: Any) -> None:
        self._pure = output.num_tokens == len(output.requests) == self._batch

    def _saw_step(self, _: Any) -> None:
        if self._pure:
            self.steps.append(self._own_times())
        self._spent.clear()
        self._last_end = time.thread_time()

    def _own_times(self) -> dict[str, float]:
        own = {part: self._spent[part] for part in PARTS}
        for part, outer in INSIDE.items():
            if not self._spent[part]:
                continue
            calls = self._batch if part == "on_step" else 1
            own[outer] -= self._spent[part] + 2 * self._tick * calls
            own[part] -= self._tick * calls
        return own

    def medians(self) -> dict[str, float]:
        """Median seconds of each part, each without what it contains."""
        return {part: statistics.median(step[part] for step in self.steps) for part in PARTS}


def profile_engine(
    bench: models.BenchmarkModel, batch: int, prompt: int, new_tokens: int, rounds: int
) -> dict[str, float]:
    """Seconds of each part of a decode step at this batch size; of a step that nothing watches; of `begin_call`."""
    engine = Engine(bench.model)
    prompts = [bench.corpus[i * prompt : (i + 1) * prompt] for i in range(batch)]
    params = hf_accel.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    engine.generate(prompts, params, use_tqdm=False)

    def call(length: int) -> float:
        began = time.thread_time()
        engine.generate(prompts, dataclasses.replace(params, max_tokens=length), use_tqdm=False)
        return time.thread_time() - began

    plain = statistics.median((call(new_tokens) - call(1)) / (new_tokens - 1) for _ in range(2 * rounds))
    with StepProfile(engine, batch) as profile:
        for _ in range(rounds):
            engine.generate(prompts, params, use_tqdm=False)
    found = profile.medians()
    calls = []
    for _ in range(20):
        began = time.thread_time()
        engine.begin_request()
        calls.append(time.thread_time() - began)
    engine.shutdown()
    return {**found, "plain_step": plain, "begin_call": statistics.median(calls)}


def time_generate(bench: models.BenchmarkModel, batch: int, prompt: int, new_tokens: int, rounds: int) -> float:
    """Seconds of one decode step of HF's `generate`: the difference of a long and a short call."""
    ids = torch.tensor([bench.corpus[i * prompt : (i + 1) * prompt] for i in range(batch)])
    mask = torch.ones_like(ids)

    def call(length: int) -> float:
        began = time.thread_time()
        bench.model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
        return time.thread_time() - began

    call(2)
    return statistics.median((call(new_tokens) - call(1)) / (new_tokens - 1) for _ in range(rounds))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints the tables and updates the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="llama-100m")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV_PATH)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    stamp = results.stamp("python -m benchmarks.profile_step " + " ".join(sys.argv[1:]), 1, "cpu")
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(options.dtypes) * len(options.batches), disable=None) as bar:
        for dtype in options.dtypes:
            bench = models.load(options.model, DTYPES[dtype])
            for batch in options.batches:
                sizes = (batch, options.prompt, options.new_tokens, options.rounds)
                seconds = profile_engine(bench, *sizes)
                seconds["generate"] = time_generate(bench, *sizes)
                case = {"model": options.model, "dtype": dtype, "batch": batch}
                rows += [{**case, "part": p, "microseconds": round(1e6 * s, 1), **stamp} for p, s in seconds.items()]
                tqdm.write(table(case, seconds))
                bar.update(1)
    _write(rows, options.csv)
    return 0


def table(case: dict[str, Any], seconds: dict[str, float]) -> str:
    """One case's parts in microseconds and in per cent of the step."""
    total = sum(seconds[part] for part in PARTS)
    lines = [f"\n{case['model']} {case['dtype']}, {case['batch']} row(s): microseconds of a decode step"]
    lines += [f"  {PARTS[p]:<52}{1e6 * seconds[p]:>10.1f}{100 * seconds[p] / total:>8.1f} %" for p in PARTS]
    host = total - (seconds["native"] or seconds["forward"])
    lines.append(f"  {'whole step':<52}{1e6 * total:>10.1f}")
    lines.append(f"  {'host: all but the model':<52}{1e6 * host:>10.1f}{100 * host / total:>8.1f} %")
    lines.append(f"  {'a step that nothing watches (long - short call)':<52}{1e6 * seconds['plain_step']:>10.1f}")
    ratio = seconds["generate"] / seconds["plain_step"]
    lines.append(f"  {'HF generate, one step':<52}{1e6 * seconds['generate']:>10.1f}{ratio:>8.2f} x")
    lines.append(f"  {'once a call: weights checked, pool awake':<52}{1e6 * seconds['begin_call']:>10.1f}")
    return "\n".join(lines)


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    held = results.read(path)
    merged = {tuple(str(row[k]) for k in KEY): row for row in (*held, *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())


def _clock_cost() -> float:
    times = []
    for _ in range(200):
        began = time.thread_time()
        times.append(time.thread_time() - began)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
