"""Structured output on the CPU: compile, masks, whole generations and the JSON workload, beside the libraries that do the same.

    python -m benchmarks.structured                                   # all sections; trains the tokenizers at the first call
    python -m benchmarks.structured --sections mask --sizes 128000 --batches 32
    python -m benchmarks.structured --sections compile --cases person maxLength256
    python -m benchmarks.structured --smoke                           # tiny: does everything run?

Sides take turns, round by round; medians; ratios are taken within a round. CPU seconds of the thread (of the process where a
library compiles in a thread of its own), and the wall clock beside them. Results go to benchmarks/results/structured_<section>.csv.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import results
from benchmarks.structured_parts import compiling, generation, json_workload, masking, record, vocabularies
from benchmarks.structured_parts.cases import CASES
from benchmarks.structured_parts.context import SMOKE_CASES, SMOKE_SIZE, Context
from benchmarks.structured_parts.sides import PEERS, describe, version
from hf_accel.structured.compiler import cache_folder
from hf_accel_kernels.cpu import library

FOLDER = results.CSV_PATH.parent
SECTIONS: dict[str, Callable[[Context], None]] = {
    "tokenizers": Context.train,
    "compile": compiling.run,
    "mask": masking.run,
    "generation": generation.run,
    "json": json_workload.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parse(argv)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    command = "python -m benchmarks.structured " + " ".join(sys.argv[1:] if argv is None else argv)
    stamp = record.stamp(command.strip(), 1, "cpu", describe(options.peers))
    print(
        f"{stamp['machine']} x {stamp['cores']}, load {stamp['load']}, torch {stamp['torch']}, {stamp['peers'] or 'no peers'}"
    )
    for peer in PEERS:
        if peer not in options.peers:
            print(f"{peer} is {'not asked for' if version(peer) else 'not installed'}: left out")
    with surroundings(options.smoke, options.folder) as folder:
        for name in options.sections:
            run_section(name, options, folder, stamp)
    if options.smoke:
        print("a smoke run: it ran, its figures mean nothing")
    return 0


def run_section(name: str, options: argparse.Namespace, folder: Path, stamp: dict[str, Any]) -> None:
    """Measure a section, print its table, write its CSV after every case."""
    path, rows, began = options.out / f"structured_{name}.csv", [], time.perf_counter()  # type: Path, list[dict[str, Any]], float

    def emit(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        record.save(path, new, stamp)
        if new:
            print(f"   {new[0]['vocabulary']} {new[0]['case']} {new[0]['batch']}".rstrip(), flush=True)

    print(f"\n== {name}", flush=True)
    context = Context(
        sizes=options.sizes, cases=options.cases, batches=options.batches, peers=options.peers, rounds=options.rounds,
        seconds=options.seconds, folder=folder, smoke=options.smoke, emit=emit,
    )  # fmt: skip
    SECTIONS[name](context)
    if rows:
        print(record.table(rows))
    print(f"-- {name} took {time.perf_counter() - began:.0f} s", flush=True)


@contextmanager
def surroundings(smoke: bool, folder: Path) -> Iterator[Path]:
    """The folder of tokenizers, while constraints are cached in a folder of their own, and nothing is kept of a smoke run."""
    _, why = library.load()  # before its folder is another
    if why:
        print(f"no C++ kernels: {why}")
    kept = os.environ.get("HF_ACCEL_CACHE")
    with tempfile.TemporaryDirectory() as own:
        os.environ["HF_ACCEL_CACHE"] = own
        try:
            with torch.compiler.set_stance("force_eager" if smoke else "default"):
                yield Path(own) if smoke else folder
        finally:
            if kept is None:
                del os.environ["HF_ACCEL_CACHE"]
            else:
                os.environ["HF_ACCEL_CACHE"] = kept


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line, resolved."""
    installed = [peer for peer in PEERS if version(peer)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(vocabularies.SIZES), help="of the vocabularies")
    parser.add_argument(
        "--cases", nargs="+", choices=tuple(CASES), default=[], help="of compile and mask; default: all"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256], help="rows of a step, of mask")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=installed, help="default: those installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="a side that took so long on a case has no more rounds"
    )
    parser.add_argument("--folder", type=Path, default=cache_folder() / "benchmarks", help="of trained tokenizers")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the CSV files")
    parser.add_argument("--smoke", action="store_true", help="one tiny vocabulary and model, few cases, one round")
    options = parser.parse_args(argv)
    absent = [peer for peer in options.peers if peer not in installed]
    if absent:
        parser.error(f"not installed: {', '.join(absent)}")
    if options.smoke:
        options.sizes, options.batches, options.rounds = [SMOKE_SIZE], [1, 3], 1
        options.cases = options.cases or list(SMOKE_CASES)
    return options


if __name__ == "__main__":
    sys.exit(main())
