"""Rows of the structured output results: one figure each, the CSV keyed by what was measured, the table; and the clocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results

KEY = ("section", "vocabulary", "case", "batch", "side", "metric")
COLUMNS = (
    *KEY, "cpu", "wall", "ratio", "ratio_to", "rounds", "note", "machine", "cores", "threads", "load", "date", "python", "torch",
    "transformers", "hf_accel", "peers", "git_sha", "command",
)  # fmt: skip
_SHOWN = ("vocabulary", "case", "batch", "side", "metric", "cpu", "wall", "ratio", "ratio_to", "rounds", "note")


@dataclass
class Seconds:
    """CPU and wall seconds of one call."""

    cpu: float
    wall: float


@dataclass
class Rounds:
    """What the rounds of one side gave: a figure for each, on both clocks.

    Attributes:
        found: round -> seconds.
    """

    found: dict[int, Seconds] = field(default_factory=dict)

    def median(self, clock: str) -> float:
        return statistics.median(getattr(s, clock) for s in self.found.values())

    def ratio(self, other: Rounds) -> float | None:
        """Median over common rounds of this one's CPU seconds over the other's."""
        both = [self.found[i].cpu / max(other.found[i].cpu, 1e-12) for i in self.found if i in other.found]
        return statistics.median(both) if both else None


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> tuple[Seconds, Any]:
    """Seconds of a call, and its result. `time.process_time` sees work that is handed to another thread, too."""
    wall, cpu = time.perf_counter(), clock()
    result = call()
    return Seconds(clock() - cpu, time.perf_counter() - wall), result


def row(section: str, vocabulary: int, case: str, side: str, metric: str, **more: Any) -> dict[str, Any]:
    """A row without its stamp. `cpu` and `wall` are in the unit that `metric` names; figures without a clock go in `cpu`."""
    made = {
        "section": section,
        "vocabulary": vocabulary,
        "case": case,
        "side": side,
        "metric": metric,
        "batch": "",
        **more,
    }
    unknown = set(made) - set(COLUMNS)
    if unknown:
        raise ValueError(f"unknown column(s) {sorted(unknown)}")
    return made


def timing_rows(
    where: Mapping[str, Any], metric: str, sides: Mapping[str, Rounds], baseline: str, scale: float = 1e3
) -> list[dict[str, Any]]:
    """A row for each side that has rounds, with its ratio to the baseline's.

    Args:
        where: section, vocabulary, case, and batch if there is one.
        metric: with its unit.
        sides: by name.
        baseline: side to divide by.
        scale: of the unit: 1e3 for ms, 1e6 for us.
    """
    rows = []
    for side, rounds in sides.items():
        if not rounds.found:
            continue
        ratio = rounds.ratio(sides[baseline]) if baseline in sides and side != baseline else None
        rows.append(
            row(
                **where, side=side, metric=metric, cpu=scale * rounds.median("cpu"), wall=scale * rounds.median("wall"),
                ratio=ratio, ratio_to=baseline if ratio is not None else "", rounds=len(rounds.found),
            )
        )  # fmt: skip
    return rows


def stamp(command: str, threads: int, device: str, peers: str) -> dict[str, Any]:
    """The machine, the software, the moment."""
    made = results.stamp(command, threads, device)
    made["machine"] = made.pop("cpu")
    return {**made, "peers": peers}


def save(path: Path, rows: Sequence[dict[str, Any]], stamped: dict[str, Any]) -> None:
    """Put the rows in the file, each in the place of the one with its key."""
    results.update([{k: _short(v) for k, v in (r | stamped).items()} for r in rows], path, KEY, COLUMNS)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Aligned columns for a terminal; columns that no row fills are left out."""
    lines = [[str(_short(r.get(c))) for c in _SHOWN] for r in rows]
    return results.aligned(_SHOWN, lines, texts=("case", "side", "metric", "ratio_to", "note"))


def _short(value: Any) -> Any:
    if value is None:
        return ""
    return float(f"{value:.4g}") if isinstance(value, float) else value
