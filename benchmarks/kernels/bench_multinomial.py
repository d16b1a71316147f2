"""One draw per row: torch.multinomial against the op that skips zero probabilities. Thread CPU time, interleaved, medians.

OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python benchmarks/kernels/bench_multinomial.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from hf_accel_kernels.multinomial import multinomial

VOCAB_SIZE = 32000


def measure(num_rows: int, top_k: int, repeats: int) -> tuple[float, float]:
    """(torch's, ours) in ms."""
    scores = torch.randn((num_rows, VOCAB_SIZE), generator=torch.Generator().manual_seed(num_rows)) * 3
    threshold = scores.topk(top_k, dim=-1).values[:, -1:]
    probs = scores.masked_fill(scores < threshold, float("-inf")).softmax(dim=-1)
    times: tuple[list[float], list[float]] = ([], [])
    ways: tuple[Callable[[], torch.Tensor], ...] = (lambda: torch.multinomial(probs, 1), lambda: multinomial(probs))
    for draw in ways:
        draw()
    for _ in range(repeats):
        for draw, seconds in zip(ways, times, strict=True):
            start = time.thread_time()
            draw()
            seconds.append(time.thread_time() - start)
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), vocabulary of {VOCAB_SIZE}")
    for num_rows in (1, 8):
        for top_k in (40, VOCAB_SIZE):
            torchs, ours = measure(num_rows, top_k, options.repeats)
            print(f"rows {num_rows} top_k {top_k:5d}: torch {torchs:.3f} ms, ours {ours:.3f} ms, {torchs / ours:.1f}x")


if __name__ == "__main__":
    main()
