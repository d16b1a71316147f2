"""Everything that is measured on a GPU, in one command of under ten minutes: kernels, whole models, workloads, latencies.

    python -m benchmarks.gpu_suite                          # all sections, most valuable first, within 520 s
    python -m benchmarks.gpu_suite --only kernels models    # some of them
    python -m benchmarks.gpu_suite --cases mla_decode       # cases whose names hold one of these words
    python -m benchmarks.gpu_suite --smoke                  # tiny shapes, on CPU too: does everything run?

Each section runs in a process of its own (`gpu/isolation.py`): a failure is reported and the others go on. The CSV is written
after every case, so that a run which is cut keeps what it had.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import hf_accel
from benchmarks.gpu import isolation, record

RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS: dict[str, float] = {
    "ceilings": 25,
    "kernels": 135,
    "models": 120,
    "throughput": 130,
    "switches": 60,
    "latency": 45,
}
"""Name of the module in `benchmarks/gpu` -> its share of the budget; what a section leaves over goes to those after it."""
BUDGET = 520.0
GRACE = 40.0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a case failed or an output was wrong. What is not there, or had no time, is no failure."""
    options = parse(argv)
    if options.list:
        print("\n".join(f"{name}: {seconds:.0f} s" for name, seconds in SECTIONS.items()))
        return 0
    started = time.monotonic()
    faulthandler.dump_traceback_later(options.budget + GRACE + 20, exit=True)
    command = "python -m benchmarks.gpu_suite " + " ".join(sys.argv[1:] if argv is None else argv)
    stamp = make_stamp(options.device, command.strip())
    path = options.csv or RESULTS / f"gpu_suite_{'smoke' if options.smoke else slug(stamp['card'])}.csv"
    names = [name for name in SECTIONS if name == "ceilings" or name in options.only]
    print(f"{stamp['card']}, driver {stamp['driver']}, torch {stamp['torch']}, triton {stamp['triton']}, "
          f"transformers {stamp['transformers']}, flashinfer {stamp['flashinfer']}; {options.budget:.0f} s")  # fmt: skip
    rows: list[dict[str, Any]] = []
    workers = isolation.Workers()
    share = options.budget / sum(SECTIONS[name] for name in names)
    deadline, reached = started, {"copy": 0.0, "gemm": 0.0}
    try:
        for number, name in enumerate(names):
            deadline += share * SECTIONS[name]
            order = {
                "module": f"benchmarks.gpu.{name}", "section": name, "device": options.device, "smoke": options.smoke,
                "deadline": deadline, "only": [] if name == "ceilings" else options.cases, **reached,
            }  # fmt: skip
            more = number + 1 < len(names)
            messages = in_process(order) if options.in_process else workers.run(order, more=more)
            run_section(order, messages, rows, lambda: record.write(path, rows, stamp))
            reached = ceilings_of(rows)
    finally:
        workers.close()
        faulthandler.cancel_dump_traceback_later()
    print(f"\n== targets, {time.monotonic() - started:.0f} s\n{targets_table(rows)}\n{path}")
    if options.smoke:
        print("a smoke run: it ran, its figures mean nothing")
    return 1 if any(r["status"] in ("failed", "wrong") for r in rows) else 0


def run_section(
    order: dict[str, Any], messages: Iterable[isolation.Message], rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Add the section's rows, one of its own for each case that could not be measured, and one for its seconds."""
    section, start, first = order["section"], time.monotonic(), len(rows)
    print(f"\n== {section}, {max(0.0, order['deadline'] - start):.0f} s to spend", flush=True)
    for message in messages:
        if message[0] == "row":
            rows.append(message[1])
        elif message[0] == "end":
            _, case, seconds, status, note = message
            print(f"   {case}: {status}, {seconds:.1f} s", flush=True)
            if status != "ok":
                rows.append(record.row(section, case, "", "", status=status, note=note))
            save()
    seconds = time.monotonic() - start
    print(record.table(rows[first:]), flush=True)
    print(f"-- {section} took {seconds:.0f} s", flush=True)
    rows.append(record.row(section, "whole section", "", "s", seconds))
    save()


def in_process(order: dict[str, Any]) -> Iterator[isolation.Message]:
    """A section without a process of its own."""
    messages: list[isolation.Message] = []
    isolation.quiet()
    isolation.run_cases(order, (), messages.append)
    return iter(messages)


def ceilings_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Best copy in bytes a second and best GEMM in FLOPs a second of the rows so far."""
    found = {"copy": 0.0, "gemm": 0.0}
    for r in rows:
        if r["section"] == "ceilings" and r["case"] in found and r["value"] is not None:
            unit = 1e9 if r["metric"] == "GB/s" else 1e12
            found[r["case"]] = max(found[r["case"]], r["value"] * unit)
    return found


def targets_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each expected figure with its measured one."""
    lines = []
    for r in record.target_rows(rows):
        measured = (
            "not measured" if r["value"] is None else f"{r['value']:.3g} {'met' if r['met'] == 'yes' else 'MISSED'}"
        )
        lines.append(f"{r['case']:26} {measured:18} {r['note']} {r['form']}".rstrip())
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line, resolved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS), help="sections")
    parser.add_argument(
        "--cases", nargs="+", default=[], help="cases whose name holds one of these (ceilings always run)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--device", default="cuda" if _has_gpu() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--in-process", action="store_true", help="no processes of their own for sections")
    parser.add_argument("--csv", type=Path, default=None, help="default: benchmarks/results/gpu_suite_<card>.csv")
    parser.add_argument("--list", action="store_true", help="only name the sections")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.smoke:
        parser.error("no GPU here: only --smoke runs on the CPU")
    return options


def make_stamp(device: str, command: str) -> dict[str, Any]:
    """The card, the software, the moment; without a CUDA context in this process."""
    import torch

    on_gpu = device.startswith("cuda")
    card = (_smi("name") or torch.cuda.get_device_name()) if on_gpu else "CPU"
    versions = {name: _version(package) for name, package in _PACKAGES.items()}
    return {
        "card": card,
        "driver": _smi("driver_version") if on_gpu else "",
        **versions,
        "cuda": torch.version.cuda or "",
        "hf_accel": hf_accel.__version__,
        "python": platform.python_version(),
        "git_sha": _git("describe", "--always", "--dirty"),
        "cpu": f"{platform.processor() or platform.machine()} x {os.cpu_count()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": command,
    }


_PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "flashinfer": "flashinfer-python",
}


def slug(card: str) -> str:
    """A card's name as part of a file's."""
    words = [w for w in re.split(r"[^a-z0-9]+", card.lower()) if w and w not in ("nvidia", "geforce", "tesla")]
    return "_".join(words) or "gpu"


def _has_gpu() -> bool:
    if _smi("name"):
        return True
    import torch

    return torch.cuda.is_available()


def _smi(field: str) -> str:
    return _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"])


def _git(*arguments: str) -> str:
    return _output(["git", *arguments])


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=RESULTS.parent)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout.strip() else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "" if importlib.util.find_spec(package.removesuffix("-python")) is None else "unknown"


if __name__ == "__main__":
    sys.exit(main())
