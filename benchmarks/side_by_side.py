"""HF's three ways of generating and hf-accel on the same workloads, in one process, interleaved.

    python -m benchmarks.side_by_side --list
    python -m benchmarks.side_by_side --quick
    python -m benchmarks.side_by_side --rounds 3 --readme

A round runs every arm of a case once, in turn (A B C D, A B C D, ...); ratios are taken within a round, then their median.
Each run starts with an empty prefix cache and warm weights. Results go to benchmarks/results/side_by_side.csv.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks import arms, models, results, workloads
from benchmarks.results import ArmRecord, Timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One workload on one model in one dtype."""

    workload: str
    model: str
    dtype: str

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether every pattern is part of the case's name."""
        return all(p in f"{self.workload}/{self.model}/{self.dtype}" for p in patterns)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a case failed, or fp32 outputs differ from `generate`'s."""
    options = parse(argv)
    cases = [Case(w, m, d) for m, d, w in itertools.product(options.models, options.dtypes, options.workloads)]
    cases = [case for case in cases if case.matches(options.only)]
    if options.list:
        for case in cases:
            print(f"{case.workload}/{case.model}/{case.dtype}: {', '.join(options.arms)}")
        return 0
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_accel").setLevel(logging.WARNING)
    command = "python -m benchmarks.side_by_side " + " ".join(sys.argv[1:] if argv is None else argv)
    stamp = results.stamp(command.strip(), options.threads, options.device)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with tqdm(total=len(cases) * len(options.arms) * options.rounds, unit="run", disable=None) as bar:
        for case in cases:
            try:
                new = run_case(case, options, stamp, bar)
            except Exception as error:
                failed.append(f"{case}: {type(error).__name__}: {error}")
                if options.strict:
                    raise
                continue
            rows += new
            results.update(new, options.csv)
            failed += [f"{case}: {row['arm']} differs from its reference" for row in new if _differs(row)]
    print(results.text_table(rows))
    if options.readme:
        print("\n" + results.markdown_table(results.read(options.csv)))
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line, resolved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.NAMES, default=["llama-100m", "demo"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--workloads", nargs="+", choices=workloads.NAMES, default=list(workloads.NAMES))
    parser.add_argument("--arms", nargs="+", choices=arms.NAMES, default=list(arms.DEFAULT))
    parser.add_argument("--only", nargs="+", default=[], help="cases whose workload/model/dtype holds all of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=float("inf"),
        help="the one-by-one arm stops after so long; another arm that takes longer runs one round only",
    )
    parser.add_argument("--cb-max-batch-tokens", type=int, default=arms.CB_MAX_BATCH_TOKENS)
    parser.add_argument("--quick", action="store_true", help="the tiny model on shrunk workloads, one round, own CSV")
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--list", action="store_true", help="only name what would run")
    parser.add_argument("--readme", action="store_true", help="print the README's table from the whole CSV")
    parser.add_argument("--strict", action="store_true", help="stop at the first failure")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.rounds = ["tiny"], 1
    if options.csv is None:
        options.csv = results.CSV_PATH.with_name("quick.csv") if options.quick else results.CSV_PATH
    return options


def run_case(case: Case, options: argparse.Namespace, stamp: dict[str, Any], bar: tqdm) -> list[dict[str, Any]]:
    """All rounds of one case; its CSV rows."""
    bar.set_description(f"{case.workload} {case.model} {case.dtype}")
    plain = models.load(case.model, DTYPES[case.dtype], options.device)
    workload = workloads.make(case.workload, plain.corpus, plain.max_positions)
    if options.quick:
        workload = workloads.shrunk(workload)
    runs = list(_make_arms(options, case, plain, workload))
    records = {arm.name: ArmRecord(arm.api) for arm in runs}
    try:
        for arm in runs:  # warm weights, compiled kernels, allocated pools
            _timed(arm, 0, options.device)
        for number in range(options.rounds):
            outputs: dict[str, list[list[int]]] = {}
            for arm in runs:
                record = records[arm.name]
                bar.update(1)
                if record.capped:
                    continue
                result, timing = _timed(arm, number, options.device)
                record.timings[number] = timing
                record.hit_rate, record.num_fallbacks = result.hit_rate, record.num_fallbacks + result.num_fallbacks
                one_by_one = isinstance(arm, arms.GenerateOneByOne)
                record.capped = result.capped or (timing.wall > options.max_seconds and not one_by_one)
                outputs[arm.name] = result.outputs
            _compare(workload, runs, outputs, records)
    finally:
        for arm in runs:
            arm.close()
    fields = {"workload": case.workload, "model": case.model, "dtype": case.dtype, "device": options.device}
    return results.make_rows(fields, records, stamp, workload)


def _make_arms(
    options: argparse.Namespace, case: Case, plain: models.BenchmarkModel, workload: workloads.Workload
) -> Iterator[arms.Arm]:
    """HF's arms share a model; each of hf-accel's has one of its own, so that nothing is patched back and forth."""
    for name in options.arms:
        kind = arms.ARMS[name]
        if kind is arms.GenerateOneByOne:
            yield arms.GenerateOneByOne(plain, workload, options.max_seconds)
        elif kind is arms.ContinuousBatching:
            yield arms.ContinuousBatching(plain, workload, options.cb_max_batch_tokens)
        elif issubclass(kind, arms.HFAccel):
            yield kind(models.load(case.model, DTYPES[case.dtype], options.device), workload)
        else:
            yield kind(plain, workload)


def _timed(arm: arms.Arm, seed: int, device: str) -> tuple[arms.RunResult, Timing]:
    arm.reset()
    torch.manual_seed(seed)
    try:
        _synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        result = arm.run()
        _synchronize(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        arm.pause()
    return result, Timing(wall, cpu, result.num_tokens)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _compare(
    workload: workloads.Workload,
    runs: Sequence[arms.Arm],
    outputs: dict[str, list[list[int]]],
    records: dict[str, ArmRecord],
) -> None:
    """Count equal outputs: greedy against one-by-one `generate`, sampled against one `generate` call of the same seed."""
    reference = "generate_batch_padded" if workload.sampled else "generate"
    if reference not in outputs:
        return
    for arm in runs:
        if arm.name not in outputs or (workload.sampled and not arm.sampling_like_hf):
            continue
        pairs = [(a, b) for a, b in zip(outputs[arm.name], outputs[reference], strict=True) if a and b]
        equal, compared = records[arm.name].equal
        records[arm.name].equal = (equal + sum(a == b for a, b in pairs), compared + len(pairs))


def _differs(row: dict[str, Any]) -> bool:
    """Greedy fp32 outputs of hf-accel must be all equal; sampling may meet a rounding tie, so it is only reported."""
    return (
        row["arm"].startswith("hf_accel")
        and row["dtype"] == "fp32"
        and row["workload"] != "self_consistency"
        and row["equal_outputs"] != ""
        and row["equal_outputs"] < 1
    )


if __name__ == "__main__":
    sys.exit(main())
