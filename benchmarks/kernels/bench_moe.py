"""Routed experts: ours against the ways HF has of running them, on one thread, in thread CPU time.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python benchmarks/kernels/bench_moe.py [--csv out.csv] [--dtype bfloat16]

Providers run interleaved, round by round; a figure is the median over rounds. Calls rotate through the layers, so that the
caches do not hold their weights. GB/s counts the weights of the experts that were chosen, once; a read probe of 256 MiB in
the same rounds says what this machine gives. `batched_mm` copies the weights of every choice and is left out where that
would take over 2 GB.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_fused_decoder import Probe, interleaved, rotating
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_accel_kernels.moe import moe_experts

TOKENS = (1, 2, 4, 16, 64, 256, 1024)
COPY_LIMIT = 2 << 30


@dataclass(frozen=True)
class Shape:
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_layers: int


SHAPES = {
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408, 2),
    "mixtral-small": Shape(8, 2, 1024, 3584, 4),
    "olmoe": Shape(64, 8, 2048, 1024, 2),
}


def make_layers(shape: Shape, dtype: torch.dtype) -> list[nn.Module]:
    config = Qwen3MoeConfig(
        num_experts=shape.num_experts, hidden_size=shape.hidden_size, moe_intermediate_size=shape.intermediate_size
    )
    config._experts_implementation = "eager"
    layers = []
    for _ in range(shape.num_layers):
        with torch.device("meta"):
            layer = Qwen3MoeExperts(config)
        layer = layer.to(dtype).to_empty(device="cpu").requires_grad_(False)
        for weight in layer.parameters():
            expert = torch.randn(weight.shape[1:]).mul_(weight.shape[2] ** -0.5).to(dtype)
            for index in range(shape.num_experts):
                weight[index] = expert.roll(index, 0)
        layers.append(layer)
    return layers


def ours(layer: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return moe_experts(x, ids, weights, layer.gate_up_proj, layer.down_proj)


def eager(layer: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return layer(x, ids, weights)


def providers(
    layers: list[nn.Module], shape: Shape, num_tokens: int, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], int]:
    """The calls to time, and the bytes of the weights that one call's experts have (a mean over the layers)."""
    expert_bytes = 3 * shape.hidden_size * shape.intermediate_size * dtype.itemsize
    forms = {"ours": ours, "grouped_mm": grouped_mm_experts_forward, "eager": eager}
    if num_tokens * shape.top_k * expert_bytes <= COPY_LIMIT:
        forms["batched_mm"] = batched_mm_experts_forward
    calls: dict[str, list[Callable[[], object]]] = {name: [] for name in forms}
    num_bytes = 0
    for layer in layers:
        x = torch.randn(num_tokens, shape.hidden_size).to(dtype)
        ids = torch.rand(num_tokens, shape.num_experts).topk(shape.top_k).indices
        weights = torch.rand(num_tokens, shape.top_k).to(dtype)
        num_bytes += ids.unique().numel() * expert_bytes // len(layers)
        for name, form in forms.items():
            calls[name].append(functools.partial(form, layer, x, ids, weights))
    return {name: rotating(list_of) for name, list_of in calls.items()}, num_bytes


@torch.no_grad()
def bench(name: str, dtype: torch.dtype, rounds: int, tokens: list[int], probe: Probe) -> list[dict[str, object]]:
    shape, rows = SHAPES[name], []
    layers = make_layers(shape, dtype)
    for num_tokens in tokens:
        torch.manual_seed(num_tokens)
        runs, num_bytes = providers(layers, shape, num_tokens, dtype)
        flops = 6.0 * num_tokens * shape.top_k * shape.hidden_size * shape.intermediate_size
        repeat = shape.num_layers if num_tokens <= 64 else 1
        times = interleaved({**runs, "read probe": probe}, max(3, rounds // 2) if num_tokens > 64 else rounds, repeat)
        for provider, seconds in times.items():
            counted = probe.num_bytes if provider == "read probe" else num_bytes
            rows.append(
                {
                    "shape": name, "dtype": str(dtype).removeprefix("torch."), "tokens": num_tokens, "provider": provider,
                    "ms": round(seconds * 1e3, 3), "MB": round(counted / 1e6, 1), "GB/s": round(counted / seconds / 1e9, 2),
                    "GFLOP/s": 0 if provider == "read probe" else round(flops / seconds / 1e9, 1),
                }
            )  # fmt: skip
        cells = [f"{p}: {t * 1e3:.2f} ms" for p, t in times.items() if p != "read probe"]
        speed = f"{num_bytes / times['ours'] / 1e9:.1f} of {probe.num_bytes / times['read probe'] / 1e9:.1f} GB/s"
        ratio = f"x{times['grouped_mm'] / times['ours']:.2f}"
        print(f"{name} {rows[-1]['dtype']} T={num_tokens:<5}", " | ".join(cells), "|", speed, ratio, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], action="append")
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    probe, rows = Probe(), []
    for name in args.shape or ["deepseek-v2-lite", "mixtral-small"]:
        for dtype in args.dtype or ["float32", "bfloat16"]:
            rows += bench(name, getattr(torch, dtype), args.rounds, args.tokens or list(TOKENS), probe)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
