"""How many real JSON Schemas each backend takes, and whether it takes them rightly: instances told valid and invalid, token by token.

    python -m benchmarks.schema_coverage <folder of MaskBench data> [--count 500] [--seed 0] [--limit 20] [--engines both automata]

The data are JSON files {"schema": ..., "tests": [{"valid": bool, "data": ...}, ...]} and are not part of this repository. Every
schema is compiled and its instances are checked in another process, which a limit on its CPU time ends. Prints a table, writes
results/schema_coverage.csv and, with `--details FILE`, what became of each schema.

Engines: `automata` our front end alone, `both` with the dynamic backend behind it (what users get), `dynamic` that backend asked
for everything, `llguidance` itself with its own defaults.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

import hf_accel
from benchmarks import results
from hf_accel.structured.compiler import ConstraintCompiler
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.dynamic import DynamicBackend, DynamicGrammar, Matcher
from hf_accel.structured.syntax import NotRegular, StructureError
from hf_accel.structured.token_fsm import TokenFsm
from hf_accel.structured.vocabulary import Vocabulary

ENGINES = ("automata", "dynamic", "both", "llguidance")
CSV_PATH = Path(__file__).parent / "results" / "schema_coverage.csv"
DEMO = Path(hf_accel.__file__).parent / "demo_model"
MEMORY = 6 << 30
COLUMNS = (
    *(
        "engine",
        "schemas",
        "compiled",
        "fully_right",
        "some_valid_rejected",
        "some_invalid_accepted",
        "timed_out",
        "dynamic",
    ),
    *("compile_ms_median", "compile_ms_p90", "compile_ms_p99", "sample", "command", "machine", "date"),
)


class Bench:
    """Compiles and checks for one tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO)
        self.vocabulary = Vocabulary.of(self.tokenizer, len(self.tokenizer), [self.tokenizer.eos_token_id])
        self.dynamic = DynamicBackend(self.vocabulary)
        self.dynamic.compile(Constraint.grammar('start: "a"'), NotRegular(""))  # its tokenizer is made once

    def check(self, engine: str, case: dict[str, Any]) -> dict[str, Any]:
        """What became of a schema: refused (with the reason), or which instances were taken wrongly."""
        started = time.perf_counter()
        try:
            accepts, is_dynamic = self._compiled(engine, case["schema"])
        except StructureError as error:
            return {"refused": str(error)[:300], "ms": (time.perf_counter() - started) * 1000}
        milliseconds = (time.perf_counter() - started) * 1000
        wrong = {True: 0, False: 0}
        for test in case["tests"]:
            tokens = self.tokenizer.encode(json.dumps(test["data"], ensure_ascii=False), add_special_tokens=False)
            wrong[test["valid"]] += accepts(tokens) != test["valid"]
        return {"rejected": wrong[True], "accepted": wrong[False], "dynamic": is_dynamic, "ms": milliseconds}

    def _compiled(self, engine: str, schema: Any) -> tuple[Callable[[list[int]], bool], bool]:
        constraint = Constraint.json_schema(schema)
        if engine == "automata":
            found: Any = ConstraintCompiler(self.vocabulary)._automaton(constraint)
        elif engine == "both":
            compiler = ConstraintCompiler(self.vocabulary)
            compiler._dynamic = self.dynamic
            found = compiler.compile(constraint)
        elif engine == "dynamic":
            found = self.dynamic.compile(constraint, NotRegular(""))
        else:
            found = self._of_llguidance(schema)
        if isinstance(found, TokenFsm):
            return lambda tokens: _walk(found, tokens, self.tokenizer.eos_token_id), False
        return lambda tokens: _match(found.matcher(), tokens, self.tokenizer.eos_token_id), True

    def _of_llguidance(self, schema: Any) -> DynamicGrammar:
        import llguidance

        lark = f'%llguidance {{"no_forcing": true}}\nstart: %json {json.dumps(schema)}'
        return self.dynamic._checked(llguidance, lark)


def _walk(fsm: TokenFsm, tokens: list[int], eos: int) -> bool:
    state, count = fsm.start, 0
    for token in [*tokens, eos]:
        base, low, low_span, high, high_span = fsm.row_of[state].tolist()
        row = fsm.rows[base + min(max(count - low, 0), low_span) + min(max(count - high, 0), high_span)]
        if not fsm.masks[row, token // 32] >> (token % 32) & 1:
            return False
        state, count = fsm.advance(state, token, count)
    return True


def _match(matcher: Matcher, tokens: list[int], eos: int) -> bool:
    try:
        matcher.move_to(tokens)
        return not matcher.done and bool(matcher.mask()[eos // 32] >> (eos % 32) & 1)
    except StructureError:
        return False


def _serve(bench: Bench, pipe: Connection, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while True:
        engine, path = pipe.recv()
        # The soft limit ends the process.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + limit, resource.RLIM_INFINITY))
        try:
            pipe.send(bench.check(engine, json.loads(Path(path).read_text())))
        except MemoryError:
            pipe.send({"refused": "out of memory", "ms": 0.0, "timed_out": True})


class Worker:
    """A process that checks, and ends when it takes too long."""

    def __init__(self, bench: Bench, limit: int) -> None:
        self._bench, self._limit = bench, limit
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._bench, theirs, self._limit), daemon=True)
        self._process.start()
        theirs.close()

    def check(self, engine: str, path: Path) -> dict[str, Any]:
        self._pipe.send((engine, str(path)))
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            self._start()
            return {"refused": f"more than {self._limit} s", "ms": self._limit * 1000, "timed_out": True}


def cases(folder: Path, count: int, seed: int) -> list[Path]:
    """A random sample of the files that have a schema and tests."""
    paths = sorted(folder.rglob("*.json"))
    random.Random(seed).shuffle(paths)
    return [p for p, _ in zip(_with_tests(paths), range(count), strict=False)]


def _with_tests(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(content, dict) and "schema" in content and content.get("tests"):
            yield path


def row(engine: str, found: list[dict[str, Any]], sample: str, command: str) -> dict[str, Any]:
    """A line of the table."""
    compiled = [f for f in found if "refused" not in f]
    times = sorted(f["ms"] for f in found)
    return {
        "engine": engine,
        "schemas": len(found),
        "compiled": len(compiled),
        "fully_right": sum(not f["rejected"] and not f["accepted"] for f in compiled),
        "some_valid_rejected": sum(bool(f["rejected"]) for f in compiled),
        "some_invalid_accepted": sum(bool(f["accepted"]) for f in compiled),
        "timed_out": sum(f.get("timed_out", False) for f in found),
        "dynamic": sum(f["dynamic"] for f in compiled),
        "compile_ms_median": round(statistics.median(times), 1),
        "compile_ms_p90": round(times[int(len(times) * 0.9)], 1),
        "compile_ms_p99": round(times[int(len(times) * 0.99)], 1),
        "sample": sample,
        "command": command,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=20, help="seconds of CPU time for one schema")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["automata", "both", "llguidance"])
    parser.add_argument("--details", type=Path, help="CSV of what became of each schema")
    parser.add_argument("--output", type=Path, default=CSV_PATH)
    options = parser.parse_args()
    worker, paths = Worker(Bench(), options.limit), cases(options.folder, options.count, options.seed)
    sample = f"{len(paths)} of MaskBench, seed {options.seed}, {options.limit} s each"
    command = f"python -m benchmarks.schema_coverage FOLDER --count {options.count} --seed {options.seed}"
    rows, details, stamped = [], [], results.stamp(command, 1, "cpu")
    for engine in options.engines:
        found = [worker.check(engine, path) for path in tqdm(paths, desc=engine, mininterval=5)]
        details += [{"engine": engine, "file": p.name, **f} for p, f in zip(paths, found, strict=True)]
        rows.append({**row(engine, found, sample, command), "machine": stamped["cpu"], "date": stamped["date"]})
        print({k: v for k, v in rows[-1].items() if k not in COLUMNS[-4:]}, flush=True)
        for reason, number in Counter(f["refused"][:60] for f in found if "refused" in f).most_common(12):
            print(f"  {number:4} {reason}")
    _write(options.output, list(COLUMNS), rows)
    if options.details:
        names = ["engine", "file", "refused", "rejected", "accepted", "dynamic", "ms", "timed_out"]
        _write(options.details, names, details)


def _write(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
