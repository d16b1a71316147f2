"""Latent attention (DeepSeek's MLA) on one CPU thread: absorbed C++, absorbed torch, HF's expand-every-step, expanded.

    OMP_NUM_THREADS=1 python benchmarks/kernels/bench_mla.py [--csv out.csv] [--only decode] [--heads 16] [--dtype bfloat16]

Sizes of DeepSeek-V2 and V3: rank 512, rope 64, nope 128, v 128; 16 heads (V2-Lite) and 128 (V3). Thread CPU time,
providers interleaved round by round, medians. Decode rotates layers of pages and weights, so that no cache holds them;
GB/s counts each latent row once, beside what a plain read of as cold memory gives in the same rounds. `attend` is attention
alone, `absorbed` one layer's whole call (absorb, attend, expand), `torch` the same in torch ops on the gathered rows, `hf`
what transformers does: kv_b_proj over the whole history, then scaled_dot_product_attention (one sequence, timed once or
twice; its time for a batch is that times the batch). Results are compared with each other before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_accel_kernels import mla, mla_torch
from hf_accel_kernels.cpu.mla import CpuMla
from hf_accel_kernels.huge_pages import empty_in_huge_pages

RANK, ROPE, NOPE, V, PAGE_SIZE = 512, 64, 128, 128, 16
SCALE = (NOPE + ROPE) ** -0.5
COLD_BYTES = 160 << 20
HF_BYTES = 3 << 30  # of expanded keys and values: no HF figure beyond
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def timed(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def median_ms(times: list[float]) -> float:
    return round(statistics.median(times) * 1e3, 3)


class Layers:
    """Pages and weights of as many layers as no cache holds, and one batch of sequences of equal lengths."""

    def __init__(self, heads: int, dtype: torch.dtype, batch: int, query_len: int, seq_len: int, cold: bool) -> None:
        num_pages = batch * -(-seq_len // PAGE_SIZE)
        layer_bytes = num_pages * PAGE_SIZE * (RANK + ROPE) * dtype.itemsize
        self.num_bytes = batch * seq_len * (RANK + ROPE) * dtype.itemsize
        weight_bytes = heads * (NOPE + V) * RANK * dtype.itemsize
        count = 1 + COLD_BYTES // layer_bytes if cold else 1
        self.pages = [empty_in_huge_pages((num_pages, PAGE_SIZE, RANK + ROPE), dtype).normal_() for _ in range(count)]
        kept = 1 + COLD_BYTES // weight_bytes if cold else 1
        shape = (heads * (NOPE + V), RANK)
        self.raw = [(torch.randn(shape) / RANK**0.5).to(dtype) for _ in range(kept)]
        self.weights = [mla.AbsorbedWeights(weight, heads, NOPE) for weight in self.raw]
        self.page_table = torch.randperm(num_pages).to(torch.int32).view(batch, -1)
        self.seq_lens = torch.full((batch,), seq_len, dtype=torch.int32)
        self.starts = torch.arange(batch + 1, dtype=torch.int32) * query_len
        self.q = torch.randn(batch * query_len, heads, NOPE + ROPE).to(dtype)
        self.q_lat = torch.randn(batch * query_len, heads, RANK + ROPE).to(dtype)

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.page_table, self.seq_lens, self.starts

    def attend(self, i: int) -> torch.Tensor:
        return mla.mla_attention(self.q_lat, self.pages[i % len(self.pages)], *self.tables, SCALE, rank=RANK)

    def absorbed(self, i: int) -> torch.Tensor:
        weights, pages = self.weights[i % len(self.weights)], self.pages[i % len(self.pages)]
        return mla.mla_absorbed_attention(self.q, weights, pages, *self.tables, SCALE)

    def torch(self, i: int) -> torch.Tensor:
        """The absorbed form as torch ops."""
        per_head = self.raw[i % len(self.raw)].view(self.q.shape[1], NOPE + V, RANK)
        query = mla_torch.absorb(self.q, per_head[:, :NOPE])
        o_lat = torch.empty(*query.shape[:2], RANK, dtype=query.dtype)
        pages = self.pages[i % len(self.pages)]
        mla_torch.mla_attention(query, pages, *self.tables, SCALE, RANK, None, o_lat)
        return mla_torch.expand(o_lat, per_head[:, NOPE:])

    def expanded(self, i: int) -> torch.Tensor:
        """The first sequence: its latents expanded by the model's own linear, then `mla_expanded_attention`."""
        query_len, length = int(self.starts[1]), int(self.seq_lens[0])
        latent, rope_key = mla.mla_gather(self.pages[i % len(self.pages)], self.page_table[0], length, rank=RANK)
        kv = F.linear(latent, self.raw[i % len(self.raw)])
        return mla.mla_expanded_attention(self.q[:query_len], kv, rope_key, SCALE, nope=NOPE)

    def hf(self, i: int) -> torch.Tensor:
        """The first sequence as modeling_deepseek_v3 does it, its latents already dense."""
        query_len, length, heads = int(self.starts[1]), int(self.seq_lens[0]), self.q.shape[1]
        rows = self.pages[i % len(self.pages)].view(-1, RANK + ROPE)[None, None, :length]
        kv = F.linear(rows[..., :RANK], self.raw[i % len(self.raw)]).view(1, length, heads, -1).transpose(1, 2)
        keys = kv.new_empty(1, heads, length, NOPE + ROPE)
        keys[..., :NOPE].copy_(kv[..., :NOPE])
        keys[..., NOPE:].copy_(rows[..., RANK:].expand(-1, heads, -1, -1))
        q = self.q[:query_len].transpose(0, 1)[None]
        mask = None
        if query_len > 1:
            mask = torch.ones(query_len, length, dtype=torch.bool).tril(length - query_len)
        out = F.scaled_dot_product_attention(q, keys, kv[..., NOPE:], attn_mask=mask, scale=SCALE)
        return out.transpose(1, 2).reshape(query_len, heads, V)

    def hf_bytes(self) -> int:
        return int(self.seq_lens[0]) * self.q.shape[1] * (2 * NOPE + 2 * V + ROPE) * self.q.dtype.itemsize

    def check(self) -> None:
        absorbed, query_len = self.absorbed(0), int(self.starts[1])
        close = torch.testing.assert_close
        close(absorbed, self.torch(0), atol=TOLERANCE[self.q.dtype], rtol=1e-2)
        close(absorbed[:query_len], self.expanded(0), atol=TOLERANCE[self.q.dtype], rtol=1e-2)


def read_gbps(memory: torch.Tensor) -> float:
    seconds = timed(lambda: memory.view(torch.int64).sum())
    return memory.nbytes / seconds / 1e9


def bench_decode(heads: int, dtype: torch.dtype, batch: int, context: int, rounds: int) -> dict[str, object]:
    layers = Layers(heads, dtype, batch, 1, context, cold=True)
    layers.check()
    memory = torch.ones(32 << 20)
    providers = {"attend": layers.attend, "absorbed": layers.absorbed, "torch": layers.torch}
    times: dict[str, list[float]] = {name: [] for name in (*providers, "hf")}
    reads = []
    for i in range(rounds):
        reads.append(read_gbps(memory))
        for offset, (name, provider) in enumerate(providers.items()):
            if name != "torch" or i < 3:
                times[name].append(timed(lambda p=provider, j=i * 3 + offset: p(j)))
        if i < 2 and layers.hf_bytes() < HF_BYTES:
            times["hf"].append(batch * timed(lambda j=i: layers.hf(j)))
    row = {"case": "decode", "dtype": str(dtype)[6:], "heads": heads, "batch": batch, "context": context}
    row |= {f"{name}_ms": median_ms(seconds) if seconds else "" for name, seconds in times.items()}
    row["attend_gbps"] = round(layers.num_bytes / statistics.median(times["attend"]) / 1e9, 1)
    row["read_gbps"] = round(statistics.median(reads), 1)
    row["of_torch"] = round(statistics.median(times["torch"]) / statistics.median(times["absorbed"]), 1)
    row["of_hf"] = (
        round(statistics.median(times["hf"]) / statistics.median(times["absorbed"]), 1) if times["hf"] else ""
    )
    return row


def bench_prefill(heads: int, dtype: torch.dtype, new: int, total: int, rounds: int) -> dict[str, object]:
    layers = Layers(heads, dtype, 1, new, total, cold=False)
    layers.check()
    providers = {"absorbed": layers.absorbed, "expanded": layers.expanded, "torch": layers.torch, "hf": layers.hf}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(rounds):
        for name, provider in providers.items():
            if name in ("absorbed", "expanded") or i < 2:
                times[name].append(timed(lambda p=provider: p(0)))
    row: dict[str, object] = {"case": "prefill", "dtype": str(dtype)[6:], "heads": heads, "new": new, "total": total}
    row |= {f"{name}_ms": median_ms(seconds) for name, seconds in times.items()}
    pairs = heads * (new * total - new * (new - 1) / 2)
    flops = 2 * (pairs * (2 * RANK + ROPE) + new * heads * (NOPE + V) * RANK)
    row["absorbed_gflops"] = round(flops / statistics.median(times["absorbed"]) / 1e9)
    row["best"] = "expanded" if row["expanded_ms"] < row["absorbed_ms"] else "absorbed"
    row["predicted"] = "expanded" if mla.prefer_expanded(new, total, heads) else "absorbed"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the rows here, decode and prefill in one table")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--heads", type=int, nargs="+", default=(16, 128))
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=tuple(DTYPES))
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--context", type=int, nargs="+", default=(128, 512, 2048, 8192))
    parser.add_argument("--new", type=int, nargs="+", default=(256, 512, 1024, 2048))
    parser.add_argument("--prefix", type=int, nargs="+", default=(0,))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    CpuMla()  # raises where there is no library to measure
    rows: list[dict[str, object]] = []

    def report(row: dict[str, object]) -> None:
        if not rows or rows[-1]["case"] != row["case"]:
            print("  ".join(f"{name:>11}" for name in row))
        print("  ".join(f"{value!s:>11}" for value in row.values()), flush=True)
        rows.append(row)

    shapes = [(heads, DTYPES[dtype]) for heads in options.heads for dtype in options.dtype]
    if options.only != "prefill":
        for heads, dtype in shapes:
            for batch in options.batch:
                for context in options.context:
                    report(bench_decode(heads, dtype, batch, context, options.rounds))
    if options.only != "decode":
        for heads, dtype in shapes:
            for new in options.new:
                for prefix in options.prefix:
                    report(bench_prefill(heads, dtype, new, prefix + new, max(3, options.rounds // 3)))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(file, fieldnames=names, restval="")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
