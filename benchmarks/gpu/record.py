"""Rows of the GPU suite: one figure each, the expected figures of the project as named targets, the CSV and the tables.

Runs nothing and knows no torch, so that the parent of the measuring processes stays light.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results

STAMP_COLUMNS = (
    "card", "driver", "cuda", "torch", "triton", "transformers", "flashinfer", "hf_accel", "python", "git_sha", "cpu",
    "date", "command",
)  # fmt: skip
COLUMNS = (
    "section", "case", "form", "metric", "value", "floor", "bound", "share", "target_name", "measured", "target", "met",
    "error", "rounds", "mode", "status", "note", *STAMP_COLUMNS,
)  # fmt: skip
NOT_BEST = ("torch", "sdpa")
"""Forms that show what a library gives; a target is met by the project's own backends only."""


@dataclass(frozen=True)
class Target:
    """A figure that the project expects of one H200.

    Attributes:
        name: as rows carry it in `target_name`.
        bound: the expected value.
        says: what is measured against it.
        below: whether smaller is better.
    """

    name: str
    bound: float
    says: str
    below: bool = False

    def met(self, measured: float) -> bool:
        """Whether a measured figure is good enough."""
        return measured <= self.bound if self.below else measured >= self.bound


TARGETS = {
    t.name: t
    for t in (
        Target("paged_decode_bandwidth", 0.80, "share of copy bandwidth, 64 x 4k, 32/8 heads of 128"),
        Target("mla_decode_bandwidth", 0.80, "share of copy bandwidth, 64 x 4k, 16 heads, bf16 latents"),
        Target("prefill_gemm_rate", 0.55, "share of the bf16 GEMM rate, 8k causal"),
        Target("llama_8b_step_1", 0.80, "share of the byte floor of a decode step, batch 1"),
        Target("llama_8b_step_64", 0.80, "share of the byte floor of a decode step, batch 64"),
        Target("idle_share_64", 0.03, "device idle share of decode steps, Llama-3-8B, batch 64", below=True),
        Target("nano_vs_padded", 8.0, "throughput over HF padded generate, nano-vllm's workload"),
        Target("nano_vs_generate_batch", 2.0, "throughput over generate_batch, nano-vllm's workload"),
        Target("prefix_vs_generate_batch", 5.0, "throughput over generate_batch, shared prefix of 2k tokens"),
    )
}


def row(section: str, case: str, form: str, metric: str, value: float | None = None, **more: Any) -> dict[str, Any]:
    """A row without its stamp; `measured` and `met` follow from `target_name`.

    Args:
        metric: the value's unit, "ms", "GB/s", "tokens/s", "ratio" or "share".
        more: further columns; a row with a `target_name` is judged by its `share`, or by its value where it has none.
    """
    made = {"section": section, "case": case, "form": form, "metric": metric, "value": value, "status": "ok", **more}
    unknown = set(made) - set(COLUMNS)
    if unknown:
        raise ValueError(f"unknown column(s) {sorted(unknown)}")
    name = made.get("target_name")
    if name:
        target = TARGETS[name]
        measured = made["share"] if made.get("share") is not None else value
        made["target"] = target.bound
        if measured is not None:
            made.update(measured=measured, met="yes" if target.met(measured) else "no")
    return made


def target_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every target, also for those without a figure: the best of the project's own forms."""
    best: dict[str, dict[str, Any]] = {}
    for r in rows:
        name = r.get("target_name")
        if not name or r["section"] == "targets" or r.get("measured") is None or r["form"] in NOT_BEST:
            continue
        if r["status"] != "ok":
            continue
        known, sign = best.get(name), -1 if TARGETS[name].below else 1
        if known is None or sign * r["measured"] > sign * known["measured"]:
            best[name] = r
    made = []
    for target in TARGETS.values():
        found = best.get(target.name)
        made.append(
            row(
                "targets", target.name, found["form"] if found else "", "share" if found is None else found["metric"],
                found["measured"] if found else None, target_name=target.name,
                status="ok" if found else "not measured",
                note=f"{'<=' if target.below else '>='} {target.bound:g}: {target.says}"
                + (f" [{found['section']}: {found['case']}]" if found else ""),
            )
        )  # fmt: skip
    return made


def write(path: Path, rows: Sequence[dict[str, Any]], stamp: dict[str, Any]) -> None:
    """The whole file, the targets first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for r in (*target_rows(rows), *rows):
            writer.writerow({k: _short(v) for k, v in (r | stamp).items()})
    part.replace(path)  # a run that is cut leaves the last whole file


_SHOWN = (
    "case",
    "form",
    "metric",
    "value",
    "floor",
    "share",
    "target",
    "met",
    "error",
    "rounds",
    "mode",
    "status",
    "note",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned columns for a terminal; columns that no row fills are left out."""
    lines = [[str(_short(r.get(c))) for c in _SHOWN] for r in rows]
    return results.aligned(_SHOWN, lines, texts=("case", "form", "metric", "mode", "status", "note"))


def _short(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e5 else value
