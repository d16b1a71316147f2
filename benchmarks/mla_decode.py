"""DeepSeek on CPU: the time of a decoded token against the context before it, HF's `generate` beside the patched one.

    OMP_NUM_THREADS=1 python -m benchmarks.mla_decode [--models deepseek-v2-lite-3l] [--dtypes fp32 bf16] [--rounds 3]

Both have the context cached before the clock starts: HF in a DynamicCache of all prompt tokens but the last, hf-accel in its
prefix cache. A run then generates a few tokens in one call. Rounds alternate; medians; ratios are taken within a round.
Results go to benchmarks/results/mla_decode_cpu.csv and the plot beside it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

import hf_accel
from benchmarks import models, results
from hf_accel.kv_cache.mla_pool import MLAPool

CSV_PATH = results.CSV_PATH.with_name("mla_decode_cpu.csv")
KEY = ("model", "dtype", "context", "arm")
COLUMNS = (
    *KEY, "rounds", "ms_per_token", "speedup", "equal_outputs", "kv_bytes_per_token", "new_tokens", "cpu", "cores", "threads",
    "load", "date", "python", "torch", "transformers", "hf_accel", "git_sha", "command",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if fp32 outputs differ from HF's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=tuple(models.MLA_DIMENSIONS), default=list(models.MLA_DIMENSIONS)
    )
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=CSV_PATH)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    command = "python -m benchmarks.mla_decode " + " ".join(sys.argv[1:] if argv is None else argv)
    stamp = results.stamp(command.strip(), options.threads, "cpu")
    rows: list[dict[str, Any]] = []
    cases = [(m, d, c) for m in options.models for d in options.dtypes for c in sorted(options.contexts)]
    for name, dtype, context in tqdm(cases, unit="case", disable=None):
        new = run_case(name, dtype, context, options.new_tokens, options.rounds, stamp)
        results.update(new, options.csv, KEY, COLUMNS)
        rows += new
    for row in rows:
        print(
            f"{row['model']:22} {row['dtype']} {row['context']:6} {row['arm']:9} {row['ms_per_token']:10.2f} ms"
            f" {row['speedup']:8.2f} x  equal {row['equal_outputs']}  {row['kv_bytes_per_token']} B"
        )
    draw(results.read(options.csv), options.csv.with_suffix(".png"))
    wrong = [r for r in rows if r["dtype"] == "fp32" and not r["equal_outputs"]]
    return 1 if wrong else 0


@torch.no_grad()
def run_case(
    name: str, dtype: str, context: int, new_tokens: int, rounds: int, stamp: dict[str, Any]
) -> list[dict[str, Any]]:
    """CSV rows of both arms at one context length."""
    plain = models.load(name, DTYPES[dtype])
    ours = hf_accel.patch(models.load(name, DTYPES[dtype]).model)
    ids = torch.tensor([plain.corpus[:context]])
    filled = DynamicCache(config=plain.model.config)
    for part in ids[:, :-1].split(512, dim=1):
        plain.model(part, past_key_values=filled, use_cache=True, logits_to_keep=1)
    greedy = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    arms: dict[str, Callable[[], torch.Tensor]] = {
        "hf_generate": lambda: plain.model.generate(ids, past_key_values=copies.pop(), **greedy),
        "hf_accel": lambda: ours.generate(ids, **greedy),
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    outputs: dict[str, list[int]] = {}
    copies: list[DynamicCache] = []
    for number in range(rounds + 1):  # the first warms both up, and fills our prefix cache
        for arm, run in arms.items():
            copies[:] = [copy.deepcopy(filled)]
            start = time.perf_counter()
            outputs[arm] = run()[0, context:].tolist()
            if number:
                seconds[arm].append((time.perf_counter() - start) / new_tokens)
    engine = hf_accel.get_engine(ours)
    assert engine.stats().num_fallbacks == 0
    pool = engine.core.executor.runner.pool
    assert isinstance(pool, MLAPool)
    layer = filled.layers[0]
    held = sum(t.shape[1] * t.shape[3] * t.itemsize for t in (layer.keys, layer.values)) * len(filled.layers)
    kv_bytes = {"hf_generate": held, "hf_accel": pool.bytes_per_token}
    hf_accel.unpatch(ours)
    ratios = [a / b for a, b in zip(seconds["hf_generate"], seconds["hf_accel"], strict=True)]
    return [
        {
            "model": name, "dtype": dtype, "context": context, "arm": arm, "rounds": rounds,
            "ms_per_token": round(1000 * statistics.median(seconds[arm]), 3),
            "speedup": 1.0 if arm == "hf_generate" else round(statistics.median(ratios), 2),
            "equal_outputs": int(outputs[arm] == outputs["hf_generate"]),
            "kv_bytes_per_token": kv_bytes[arm], "new_tokens": new_tokens, **stamp,
        }
        for arm in arms
    ]  # fmt: skip


def draw(rows: Sequence[dict[str, str]], out: Path) -> None:
    """Milliseconds a token against context, a panel for each model, both axes logarithmic."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(1 + 5.5 * len(names), 4.2), squeeze=False, layout="constrained")
    styles = {("hf_generate", "fp32"): "#8c8c8c", ("hf_generate", "bf16"): "#c7c7c7"}
    styles |= {("hf_accel", "fp32"): "#1f5fa8", ("hf_accel", "bf16"): "#8fb8de"}
    for axis, name in zip(axes[0], names, strict=True):
        for (arm, dtype), color in styles.items():
            part = [r for r in rows if (r["model"], r["arm"], r["dtype"]) == (name, arm, dtype)]
            part.sort(key=lambda r: int(r["context"]))
            if part:
                xs, ys = [int(r["context"]) for r in part], [float(r["ms_per_token"]) for r in part]
                axis.loglog(xs, ys, "o-", base=2, color=color, label=f"{arm.replace('_', '-')} {dtype}")
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_xlabel("tokens of context")
        axis.set_ylabel("ms a token")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
