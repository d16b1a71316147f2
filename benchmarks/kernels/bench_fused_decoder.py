"""Packed linears and the fused decoder step against PyTorch and HF, on one thread, in thread CPU time.

    OMP_NUM_THREADS=1 python benchmarks/kernels/bench_fused_decoder.py [--csv out.csv] [--dtype bfloat16] [--only gemm]

Providers run interleaved, round by round; a figure is the median over rounds. Weights rotate through more memory than the
caches hold. GB/s counts the weights once; a read probe of 256 MiB of huge pages in the same rounds says what this machine
gives, and multiplications in registers what its units can do.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import mmap
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_accel.patching.llama import fused_decoder_for
from hf_accel_kernels.packed import PackedLinear, pack, packed_linear

SHAPES = {
    "qkv": (1280, 768), "o_proj": (768, 768), "gate_up": (4096, 768), "down": (768, 2048), "lm_head": (32000, 768),
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1024)
COLD_BYTES = 160 << 20
PAGE_SIZE = 16


class Probe:
    """What the machine gives (probe.cpp): `__call__` reads 256 MiB of huge pages once; `peak_gflops` multiplies in registers."""

    num_bytes = 256 << 20

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(__file__).with_name("probe.cpp"), Path(folder) / "probe.so"
            compiler = shutil.which("g++") or "c++"
            flags = ["-O3", "-march=native", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
            self._lib = ctypes.CDLL(str(target))
        self._lib.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._lib.probe_fma.argtypes = self._lib.probe_bf16_dot.argtypes = [ctypes.c_int64, ctypes.c_void_p]
        self._lib.probe_bf16_tiles.argtypes = [ctypes.c_int64]
        for name in ("probe_fma", "probe_bf16_dot", "probe_bf16_tiles"):
            getattr(self._lib, name).restype = ctypes.c_double
        self._memory = mmap.mmap(-1, self.num_bytes + (2 << 20))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        data = torch.frombuffer(self._memory, dtype=torch.uint8).fill_(1)
        self._start = (data.data_ptr() + 63) // 64 * 64

    def __call__(self) -> None:
        self._lib.probe_read(self._start, self.num_bytes // 4)

    def peak_gflops(self) -> dict[str, float]:
        sink = ctypes.c_float(1.0)
        runs = {
            "fp32 multiply-adds": lambda: self._lib.probe_fma(2_000_000, ctypes.byref(sink)),
            "bf16 dot products": lambda: self._lib.probe_bf16_dot(2_000_000, ctypes.byref(sink)),
            "bf16 tiles": lambda: self._lib.probe_bf16_tiles(500_000),
        }
        peaks = {}
        for name, run in runs.items():
            start = time.thread_time()
            flops = run()
            peaks[name] = flops / (time.thread_time() - start) / 1e9
        return peaks


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, repeat: int = 1) -> dict[str, float]:
    """Median seconds of thread CPU time a call for each provider."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            for _ in range(repeat):
                run()
            times[name].append((time.thread_time() - start) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One call after another, round and round, so that each finds its weights out of the caches."""
    state = [0]

    def run() -> object:
        state[0] = (state[0] + 1) % len(calls)
        return calls[state[0]]()

    return run


def linear_providers(
    weights: list[torch.Tensor], packed: list[PackedLinear], num_rows: int
) -> dict[str, Callable[[], object]]:
    x = torch.randn(num_rows, weights[0].shape[1]).to(weights[0].dtype)
    reordered = [torch.ops.mkldnn._reorder_linear_weight(w, num_rows) for w in weights]
    linear = torch.ops.mkldnn._linear_pointwise
    return {
        "packed": rotating([lambda p=p: packed_linear(x, p) for p in packed]),
        "mkldnn": rotating([lambda w=w: linear(x, w, None, "none", [], "") for w in reordered]),
        "F.linear": rotating([lambda w=w: F.linear(x, w) for w in weights]),
    }


def bench_gemm(dtype: torch.dtype, rounds: int, probe: Probe, rows: list[dict[str, object]]) -> None:
    for name, (columns, depth) in SHAPES.items():
        weight = torch.randn(columns, depth).to(dtype)
        copies = max(1, COLD_BYTES // weight.nbytes)
        weights = [weight.clone() for _ in range(copies)]
        packed = [pack([w]) for w in weights]
        for num_rows in ROWS:
            if name == "lm_head" and num_rows > 64:
                continue
            flops = 2.0 * num_rows * columns * depth
            repeat = max(1, min(copies, int(4e9 / flops)))
            times = interleaved(linear_providers(weights, packed, num_rows), rounds, repeat)
            for provider, seconds in times.items():
                rows.append(record("gemm", name, dtype, num_rows, provider, seconds, weight.nbytes, flops))
            show(rows[-len(times) :])
    times = interleaved({"read probe": probe}, rounds)
    rows.append(record("probe", "256 MiB", dtype, 0, "read probe", times["read probe"], probe.num_bytes, 0))
    show(rows[-1:])


def model_100m(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


class FusedStep:
    """`batch` sequences with `context` tokens in their pages; a call computes `new` more tokens of each."""

    def __init__(self, model: LlamaForCausalLM, batch: int, context: int, new: int) -> None:
        fused, reason = fused_decoder_for(model, page_size=PAGE_SIZE, max_positions=4096)
        assert fused is not None, reason
        self.fused, total = fused, context + new
        width = -(-total // PAGE_SIZE)
        shape = (batch * width, model.config.num_key_value_heads, PAGE_SIZE, model.config.head_dim)
        pools = [torch.randn(shape).to(model.dtype) for _ in range(2 * model.config.num_hidden_layers)]
        table = torch.randperm(batch * width).view(batch, width)
        positions = torch.arange(context, total)
        slots = table[:, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        starts = torch.arange(0, batch * new + 1, new, dtype=torch.int32)
        self.args = (
            torch.randint(0, 32000, (batch * new,)), positions.repeat(batch), slots.flatten(), table.int(),
            torch.full((batch,), total, dtype=torch.int32), starts, starts[1:].long() - 1, pools[::2], pools[1::2],
        )  # fmt: skip

    def __call__(self) -> torch.Tensor:
        return self.fused.forward(*self.args)


class HFStep:
    """The same step through the model's own forward and a DynamicCache (copied outside the timed part by `crop`)."""

    def __init__(self, model: LlamaForCausalLM, batch: int, context: int, new: int) -> None:
        self.model, self.context, self.ids = model, context, torch.randint(0, 32000, (batch, new))
        self.cache = DynamicCache(config=model.config)
        if context:
            with torch.no_grad():
                model(torch.randint(0, 32000, (batch, context)), past_key_values=self.cache, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return self.model(self.ids, past_key_values=cache, logits_to_keep=1).logits


def bench_step(dtype: torch.dtype, rounds: int, probe: Probe, rows: list[dict[str, object]]) -> None:
    model = model_100m(dtype)
    linears = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    for name, batch, context, new in (
        ("decode", 1, 128, 1), ("decode", 4, 128, 1), ("decode", 16, 128, 1), ("decode", 1, 2000, 1),
        ("prefill", 1, 0, 32), ("prefill", 1, 0, 128), ("prefill", 1, 0, 512), ("prefill", 1, 0, 2048),
    ):  # fmt: skip
        tokens = batch * new
        runs = {"fused": FusedStep(model, batch, context, new), "HF": HFStep(model, batch, context, new)}
        times = interleaved({**runs, "read probe": probe}, max(3, rounds // 2) if tokens > 256 else rounds)
        num_bytes = linears * model.lm_head.weight.element_size()
        flops = 2.0 * (linears - model.lm_head.weight.numel()) * tokens + 2.0 * model.lm_head.weight.numel() * batch
        for provider in runs:
            label = f"{name} {batch}x{new}@{context}"
            rows.append(record("step", label, dtype, tokens, provider, times[provider], num_bytes, flops))
        seconds = times["read probe"]
        rows.append(record("probe", "256 MiB", dtype, 0, "read probe", seconds, probe.num_bytes, 0))
        show(rows[-3:])


def record(
    kind: str, name: str, dtype: torch.dtype, tokens: int, provider: str, seconds: float, num_bytes: int, flops: float
) -> dict[str, object]:
    return {
        "kind": kind, "name": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "provider": provider,
        "ms": round(seconds * 1e3, 4), "GB/s": round(num_bytes / seconds / 1e9, 2), "GFLOP/s": round(flops / seconds / 1e9, 1),
        "tokens/s": round(tokens / seconds, 1),
    }  # fmt: skip


def show(rows: list[dict[str, object]]) -> None:
    head = f"{rows[0]['dtype']:9s} {rows[0]['kind']:6s} {rows[0]['name']:18s} M={rows[0]['tokens']:<5}"
    cells = [f"{r['provider']}: {r['ms']} ms {r['GB/s']} GB/s {r['GFLOP/s']} GF/s" for r in rows]
    print(head, " | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--only", choices=["gemm", "step"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    probe = Probe()
    print(", ".join(f"{name}: {peak:.0f} GF/s" for name, peak in probe.peak_gflops().items()), flush=True)
    for name in args.dtype or ["float32", "bfloat16"]:
        if args.only != "gemm":
            bench_step(getattr(torch, name), args.rounds, probe, rows)
        if args.only != "step":
            bench_gemm(getattr(torch, name), args.rounds, probe, rows)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
