"""Rows of the side-by-side results: how figures become a row, the CSV keyed by case, the tables. Runs nothing."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
CSV_PATH = ROOT / "benchmarks" / "results" / "side_by_side.csv"
PROFILE_CSV_PATH = CSV_PATH.with_name("profile_step.csv")
KEY = ("workload", "model", "dtype", "device", "arm")
BASELINES = ("generate", "generate_batch_padded", "generate_batch")
COLUMNS = (
    *KEY,
    "api",
    "rounds",
    "wall_seconds",
    "cpu_seconds",
    "tokens_per_second",
    *(f"speedup_{b}" for b in BASELINES),
    *(f"cpu_speedup_{b}" for b in BASELINES),
    "hit_rate",
    "ideal_hit_rate",
    "equal_outputs",
    "num_tokens",
    "num_tokens_wanted",
    "capped",
    "num_fallbacks",
    "cpu",
    "cores",
    "threads",
    "load",
    "date",
    "python",
    "torch",
    "transformers",
    "hf_accel",
    "git_sha",
    "command",
)

PROFILE_PARTS = {
    "schedule": "scheduler: choose requests, take pages",
    "build": "batch build: page table, positions, slots",
    "native": "forward: inside the C++ step",
    "forward": "forward: the rest of it (all, without the C++ step)",
    "sample": "sampling",
    "execute": "executor: the rest",
    "update": "scheduler: append tokens, finish",
    "on_step": "outputs",
    "step": "step loop: the rest (locks, clocks)",
    "between": "between steps: the caller's condition",
}
"""Parts of a decode step in `profile_step.csv`, in order; each is timed without the parts inside it."""


@dataclass
class Timing:
    """One timed run."""

    wall: float
    cpu: float
    num_tokens: int


@dataclass
class ArmRecord:
    """What the rounds of one arm on one case gave.

    Attributes:
        timings: round -> timing; an arm over the time cap lacks later rounds.
        equal: (equal outputs, compared outputs) over all rounds; (0, 0) where nothing can be compared.
    """

    api: str
    timings: dict[int, Timing] = field(default_factory=dict)
    hit_rate: float | None = None
    equal: tuple[int, int] = (0, 0)
    capped: bool = False
    num_fallbacks: int = 0


def speedup(record: ArmRecord, baseline: ArmRecord | None, clock: str) -> float | None:
    """Median over common rounds of the ratio of seconds a token, baseline's over this one's."""
    if baseline is None:
        return None
    ratios = []
    for number, timing in record.timings.items():
        other = baseline.timings.get(number)
        if other is not None and timing.num_tokens and other.num_tokens:
            ratios.append(
                (getattr(other, clock) / other.num_tokens) / max(getattr(timing, clock) / timing.num_tokens, 1e-12)
            )
    return statistics.median(ratios) if ratios else None


def make_rows(
    case: dict[str, Any], records: dict[str, ArmRecord], stamp: dict[str, Any], workload: Workload
) -> list[dict[str, Any]]:
    """CSV rows of one case, an arm each."""
    rows = []
    for arm, record in records.items():
        wall = [t.wall for t in record.timings.values()]
        tokens_per_second = statistics.median(t.num_tokens / t.wall for t in record.timings.values())
        row = {
            **case,
            "arm": arm,
            "api": record.api,
            "rounds": len(wall),
            "wall_seconds": _short(statistics.median(wall)),
            "cpu_seconds": _short(statistics.median(t.cpu for t in record.timings.values())),
            "tokens_per_second": _short(tokens_per_second),
            "hit_rate": _short(record.hit_rate),
            "ideal_hit_rate": _short(workload.ideal_hit_rate()),
            "equal_outputs": _short(record.equal[0] / record.equal[1]) if record.equal[1] else "",
            "num_tokens": next(iter(record.timings.values())).num_tokens,
            "num_tokens_wanted": workload.num_generated_tokens,
            "capped": int(record.capped),
            "num_fallbacks": record.num_fallbacks,
            **stamp,
        }
        for baseline in BASELINES:
            row[f"speedup_{baseline}"] = _short(speedup(record, records.get(baseline), "wall"))
            row[f"cpu_speedup_{baseline}"] = _short(speedup(record, records.get(baseline), "cpu"))
        rows.append(row)
    return rows


def aligned(columns: Sequence[str], lines: Sequence[Sequence[str]], texts: Collection[str]) -> str:
    """Aligned columns for a terminal, `texts` to the left; columns that no line fills are left out."""
    kept = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    lines = [columns, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(line[i].ljust(widths[i]) if columns[i] in texts else line[i].rjust(widths[i]) for i in kept).rstrip()
        for line in lines
    )


def stamp(command: str, threads: int, device: str) -> dict[str, Any]:
    """Where, when and with what a run was made."""
    import torch
    import transformers

    import hf_accel

    gpu = f", {torch.cuda.get_device_name()}" if device.startswith("cuda") else ""
    return {
        "cpu": _cpu_model() + gpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_accel": hf_accel.__version__,
        "git_sha": _git_sha(),
        "command": command,
    }


def read(path: Path = CSV_PATH) -> list[dict[str, str]]:
    """The rows of a results file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def update(
    rows: Sequence[dict[str, Any]],
    path: Path = CSV_PATH,
    key: Sequence[str] = KEY,
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Put rows into the file, each in the place of the one with its key."""
    table = {tuple(str(row[k]) for k in key): row for row in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


_SHOWN = (
    ("workload", "workload"),
    ("model", "model"),
    ("dtype", "dtype"),
    ("arm", "arm"),
    ("tokens_per_second", "tok/s"),
    ("speedup_generate", "x generate"),
    ("speedup_generate_batch_padded", "x padded"),
    ("speedup_generate_batch", "x generate_batch"),
    ("hit_rate", "hit rate"),
    ("ideal_hit_rate", "ideal"),
    ("equal_outputs", "equal"),
)


def text_table(rows: Iterable[dict[str, Any]]) -> str:
    """All arms in aligned columns, for a terminal. `*` marks an arm that the time cap cut short."""
    lines = [[head for _, head in _SHOWN]]
    for row in rows:
        cells = [str(row[column]) for column, _ in _SHOWN]
        cells[3] += "*" if str(row["capped"]) == "1" else ""
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(_SHOWN))]
    left = 4
    return "\n".join(
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """hf-accel's rows as a table for the README, and where and how they were measured."""
    ours = [row for row in rows if row["arm"] == "hf_accel"]
    lines = [
        "| workload | model | dtype | hf-accel tok/s | x `generate` | x padded `generate` | x `generate_batch` | hit rate (ideal) |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in ours:
        ratios = [_one_decimal(row[f"speedup_{b}"]) for b in BASELINES]
        hits = f"{100 * float(row['hit_rate']):.0f} % ({100 * float(row['ideal_hit_rate']):.0f} %)"
        rate = f"{float(row['tokens_per_second']):.0f}"
        cells = [row["workload"].replace("_", " "), row["model"], row["dtype"], rate, *ratios, hits]
        lines.append(f"| {' | '.join(cells)} |")
    commands: dict[str, list[str]] = {}
    for row in ours:
        known = commands.setdefault(_source(row), [])
        if row["command"] not in known:
            known.append(row["command"])
    for source, made_by in commands.items():
        lines.append(f"\n{source}: {', '.join(f'`{command}`' for command in made_by)}")
    return "\n".join(lines)


def _source(row: dict[str, Any]) -> str:
    return f"{row['cpu']}, {row['threads']} thread(s), torch {row['torch']}, transformers {row['transformers']}, {row['date']}"


def _one_decimal(value: Any) -> str:
    return f"{float(value):.1f}" if value not in ("", None) else "-"


def _short(value: float | None) -> Any:
    return "" if value is None else float(f"{value:.4g}")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_sha() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
