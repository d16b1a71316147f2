"""Draws benchmarks/results/side_by_side.png from the committed CSV, and nothing else.

    python -m benchmarks.plot [--csv FILE] [--out FILE]

Grouped bars: each arm's tokens per second over those of the left-padded `generate` batch, a panel for each model and dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results, workloads

BASELINE = "generate_batch_padded"
STYLE = {
    "generate": ("generate, one by one", "#c7c7c7"),
    "generate_batch_padded": ("generate, padded batch (= 1)", "#8c8c8c"),
    "generate_batch": ("generate_batch (continuous batching)", "#e0a458"),
    "hf_accel_nocache": ("hf-accel without prefix cache", "#8fb8de"),
    "hf_accel": ("hf-accel", "#1f5fa8"),
}


def draw(rows: Sequence[dict[str, str]]) -> Figure:
    """One figure: a row of panels for each model, a panel for each dtype."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    size = (1.0 + 7.2 * len(dtypes), 1.0 + 3.6 * len(models))
    figure, axes = plt.subplots(len(models), len(dtypes), figsize=size, squeeze=False, layout="constrained")
    for i, model in enumerate(models):
        for j, dtype in enumerate(dtypes):
            part = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
            if part:
                _panel(axes[i][j], part, f"{model}, {dtype}")
            else:
                axes[i][j].set_visible(False)
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _panel(axis: Axes, rows: Sequence[dict[str, str]], title: str) -> None:
    names = [n for n in workloads.NAMES if any(row["workload"] == n for row in rows)]
    arms = [a for a in STYLE if any(row["arm"] == a for row in rows)]
    width = 0.84 / max(len(arms), 1)
    for index, arm in enumerate(arms):
        label, color = STYLE[arm]
        found = {row["workload"]: row for row in rows if row["arm"] == arm}
        heights = [_value(found.get(name)) for name in names]
        places = [k + (index - (len(arms) - 1) / 2) * width for k in range(len(names))]
        axis.bar(places, heights, width, label=label, color=color)
        for place, height in zip(places, heights, strict=True):
            if height and arm in ("hf_accel", "generate_batch"):
                bold = "bold" if arm == "hf_accel" else "normal"
                axis.annotate(f"{height:.1f}", (place, height), ha="center", va="bottom", fontsize=8, fontweight=bold)
    axis.axhline(1.0, color="#555555", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=9)
    axis.set_ylabel("speed over padded generate")
    axis.set_title(title, fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)


def _value(row: dict[str, str] | None) -> float:
    return float(row[f"speedup_{BASELINE}"] or 0) if row else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=results.CSV_PATH)
    parser.add_argument("--out", type=Path, default=None, help="default: beside the CSV")
    options = parser.parse_args(argv)
    rows = results.read(options.csv)
    if not rows:
        print(f"{options.csv} has no rows: run `python -m benchmarks.side_by_side` first", file=sys.stderr)
        return 1
    out = options.out or options.csv.with_suffix(".png")
    draw(rows).savefig(out, dpi=130)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
