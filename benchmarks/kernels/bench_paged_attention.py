"""Paged attention on one CPU thread: decode against the read bandwidth, prefill against the FMA peak and torch's SDPA.

    OMP_NUM_THREADS=1 python benchmarks/kernels/bench_paged_attention.py --csv results.csv
    OMP_NUM_THREADS=1 python benchmarks/kernels/bench_paged_attention.py --heads 12 4 --no-tiles

Thread CPU time, so that other processes on the machine count little; rounds are interleaved with the probes (probe.cpp,
built beside the script's temporary files), and the ratios are medians of the rounds' ratios. Decode rotates layers so
that the last-level cache never holds the keys. Every result is first compared with torch's SDPA.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_accel.attention.base import AttentionMetadata
from hf_accel.attention.torch_backend import TorchBackend
from hf_accel.kv_cache.pool import LayerShape, MHAPool
from hf_accel_kernels.cpu.attention import CpuAttention

PAGE_SIZE, BATCH = 16, 16
COLD_BYTES = 160 << 20  # keys and values of all rotated layers together: several times the last-level cache
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Probe:
    """This core's limits, measured now."""

    def __init__(self, folder: Path, tiles: bool) -> None:
        self._tiles = tiles
        target = folder / "probe.so"
        source = Path(__file__).with_name("probe.cpp")
        command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        self._lib = ctypes.CDLL(str(target))
        self._lib.probe_read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._lib.probe_fma.argtypes = self._lib.probe_bf16_dot.argtypes = (ctypes.c_int64, ctypes.c_void_p)
        self._lib.probe_bf16_tiles.argtypes = (ctypes.c_int64,)
        for name in ("probe_fma", "probe_bf16_dot", "probe_bf16_tiles"):
            getattr(self._lib, name).restype = ctypes.c_double
        self._memory = torch.ones(64 << 20)
        self._sink = torch.ones(1)

    def read_gbps(self) -> float:
        seconds = timed(lambda: self._lib.probe_read(self._memory.data_ptr(), self._memory.numel()))
        return self._memory.nbytes / seconds / 1e9

    def peak_gflops(self, dtype: torch.dtype) -> float:
        done: list[float] = []
        if dtype == torch.bfloat16 and self._tiles:
            seconds = timed(lambda: done.append(self._lib.probe_bf16_tiles(4_000_000)))
        else:
            function = self._lib.probe_bf16_dot if dtype == torch.bfloat16 else self._lib.probe_fma
            seconds = timed(lambda: done.append(function(4_000_000, self._sink.data_ptr())))
        return done[0] / seconds / 1e9 or self.peak_gflops(torch.float32)


def timed(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def make_batch(query_len: int, seq_len: int, batch: int, num_pages: int) -> AttentionMetadata:
    pages = torch.randperm(num_pages, dtype=torch.int64)[: batch * (seq_len // PAGE_SIZE)].view(batch, -1)
    positions = torch.arange(seq_len - query_len, seq_len)
    slots = pages[:, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    return AttentionMetadata(
        page_table=pages.to(torch.int32),
        seq_lens=torch.full((batch,), seq_len, dtype=torch.int32),
        query_start_loc=torch.arange(batch + 1, dtype=torch.int32) * query_len,
        slot_mapping=slots.reshape(-1),
        query_lens_cpu=(query_len,) * batch,
        seq_lens_cpu=(seq_len,) * batch,
    )


def run_attention(
    ops: CpuAttention, q: torch.Tensor, pool: MHAPool, layer: int, batch: AttentionMetadata
) -> torch.Tensor:
    out = torch.empty_like(q)
    tables = (batch.page_table, batch.seq_lens, batch.query_start_loc)
    ops.paged_attention(q, pool.k_pages[layer], pool.v_pages[layer], *tables, q.shape[2] ** -0.5, 0, 0.0, None, out)
    return out


def bench_decode(
    ops: CpuAttention,
    probe: Probe,
    heads: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    seq_len: int,
    rounds: int,
) -> dict[str, object]:
    num_heads, num_kv_heads = heads
    num_bytes = 2 * BATCH * seq_len * num_kv_heads * head_dim * dtype.itemsize
    num_layers = -(-COLD_BYTES // num_bytes) + 1
    num_pages = BATCH * seq_len // PAGE_SIZE
    pool = MHAPool([LayerShape(num_kv_heads, head_dim, head_dim)] * num_layers, num_pages, PAGE_SIZE, dtype, "cpu")
    for pages in (*pool.k_pages, *pool.v_pages):
        pages.normal_()
    batch = make_batch(1, seq_len, BATCH, num_pages)
    q = torch.randn(BATCH, num_heads, head_dim, dtype=dtype)
    check_against_sdpa(ops, q, pool, batch)
    torch_form = TorchBackend()
    new = torch.randn(BATCH, num_kv_heads, head_dim, dtype=dtype)
    times, ratios, torch_times = [], [], []
    for i in range(rounds):
        read = probe.read_gbps()
        seconds = timed(lambda layer=i % num_layers: run_attention(ops, q, pool, layer, batch))
        times.append(seconds)
        ratios.append(num_bytes / seconds / 1e9 / read)
        if i < 5:
            layer = (i + num_layers // 2) % num_layers
            pages = (pool.k_pages[layer], pool.v_pages[layer])
            torch_times.append(timed(lambda p=pages: torch_form.forward(q, new, new, *p, batch, scale=head_dim**-0.5)))
    ms = statistics.median(times) * 1e3
    return {
        "case": "decode", "dtype": str(dtype)[6:], "head_dim": head_dim, "length": seq_len, "ms": round(ms, 3),
        "rate": f"{num_bytes / ms / 1e6:.1f} GB/s", "of_limit": f"{statistics.median(ratios):.0%}",
        "torch_ms": round(statistics.median(torch_times) * 1e3, 3),
        "speedup": round(statistics.median(torch_times) * 1e3 / ms, 2),
    }  # fmt: skip


def bench_prefill(
    ops: CpuAttention,
    probe: Probe,
    heads: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    rounds: int,
) -> dict[str, object]:
    num_heads, num_kv_heads = heads
    num_pages = length // PAGE_SIZE
    pool = MHAPool([LayerShape(num_kv_heads, head_dim, head_dim)], num_pages, PAGE_SIZE, dtype, "cpu")
    pool.k_pages[0].normal_()
    pool.v_pages[0].normal_()
    batch = make_batch(length, length, 1, num_pages)
    q = torch.randn(length, num_heads, head_dim, dtype=dtype)
    check_against_sdpa(ops, q, pool, batch)
    dense = [
        gather(p, batch).repeat_interleave(num_heads // num_kv_heads, dim=0)[None]
        for p in (pool.k_pages[0], pool.v_pages[0])
    ]
    qt = q.transpose(0, 1)[None].contiguous()
    flops = 2 * 2 * num_heads * head_dim * length * (length + 1) / 2
    times, ratios, torch_times = [], [], []
    for _ in range(rounds):
        peak = probe.peak_gflops(dtype)
        times.append(timed(lambda: run_attention(ops, q, pool, 0, batch)))
        ratios.append(flops / times[-1] / 1e9 / peak)
        torch_times.append(timed(lambda: F.scaled_dot_product_attention(qt, *dense, is_causal=True)))
    ms = statistics.median(times) * 1e3
    return {
        "case": "prefill", "dtype": str(dtype)[6:], "head_dim": head_dim, "length": length, "ms": round(ms, 3),
        "rate": f"{flops / ms / 1e6:.0f} GFLOP/s", "of_limit": f"{statistics.median(ratios):.0%}",
        "torch_ms": round(statistics.median(torch_times) * 1e3, 3),
        "speedup": round(statistics.median(t / s for t, s in zip(torch_times, times)), 2),
    }  # fmt: skip


def gather(pages: torch.Tensor, batch: AttentionMetadata) -> torch.Tensor:
    """The first sequence's keys or values, [num_kv_heads, seq_len, dim]."""
    return pages[batch.page_table[0].long()].transpose(0, 1).reshape(pages.shape[1], -1, pages.shape[3])


def check_against_sdpa(ops: CpuAttention, q: torch.Tensor, pool: MHAPool, batch: AttentionMetadata) -> None:
    num = batch.query_lens_cpu[0]
    got = run_attention(ops, q, pool, 0, batch)[:num].float()
    k, v = (
        gather(p, batch).float().repeat_interleave(q.shape[1] // p.shape[1], dim=0)
        for p in (pool.k_pages[0], pool.v_pages[0])
    )
    expected = F.scaled_dot_product_attention(q[:num].float().transpose(0, 1), k, v, is_causal=num > 1).transpose(0, 1)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[q.dtype], rtol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="query heads and kv heads")
    parser.add_argument(
        "--no-tiles", action="store_true", help="bf16 prefill on vectors even where there is a tile unit"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ops, heads = CpuAttention(), tuple(options.heads)
    tiles = ops.use_tiles(not options.no_tiles)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(Path(folder), tiles)
        print(f"read {probe.read_gbps():.1f} GB/s, fp32 {probe.peak_gflops(torch.float32):.0f} GFLOP/s, "
              f"bf16 {probe.peak_gflops(torch.bfloat16):.0f} GFLOP/s; {heads[0]}/{heads[1]} heads, page {PAGE_SIZE}, "
              f"decode batch {BATCH}, one thread")  # fmt: skip
        print("torch_ms: decode, the gather form; prefill, causal SDPA on dense keys already repeated for every head")
        for kind, run, lengths in (
            ("decode", bench_decode, (64, 256, 2048)),
            ("prefill", bench_prefill, (64, 256, 1024, 4096)),
        ):
            if options.only not in (None, kind):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for head_dim in (64, 128):
                    for length in lengths:
                        rows.append(run(ops, probe, heads, dtype, head_dim, length, options.rounds))
                        print("  ".join(f"{value!s:>12}" for value in rows[-1].values()), flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
