"""The registry of kernel benchmarks, by value: what the project's targets speak of first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu import attention_cases, elementwise_cases, mla_cases, sampling_cases
from benchmarks.gpu.context import Case, Context
from benchmarks.gpu.kernel_case import Problem, measure

LLAMA_8B = (32, 8, 128)
LLAMA_1B = (32, 8, 64)
SMOKE = (4, 2, 16)

Maker = Callable[[Context], Problem]
CASES: dict[str, Maker] = {
    "paged_decode, 64 x 4k": lambda c: attention_cases.decode(c, *c.pick((64, 4096, LLAMA_8B), (3, 40, SMOKE))),
    "mla_decode, 16 heads": lambda c: mla_cases.decode(c, c.pick(16, 3)),
    "paged_prefill, 8k causal": lambda c: attention_cases.prefill(c, *c.pick((8192, 8192, LLAMA_8B), (24, 24, SMOKE))),
    "mla_decode, 128 heads": lambda c: mla_cases.decode(c, c.pick(128, 6)),
    "paged_decode, 1 x 32k": lambda c: attention_cases.decode(c, *c.pick((1, 32768, LLAMA_8B), (1, 70, SMOKE))),
    "paged_prefill, 2k over 16k": lambda c: attention_cases.prefill(
        c, *c.pick((2048, 18432, LLAMA_8B), (9, 40, SMOKE))
    ),
    "rope_and_store, 64 tokens": lambda c: elementwise_cases.rope_and_store(c, c.pick(64, 3)),
    "rope_and_store, 8k tokens": lambda c: elementwise_cases.rope_and_store(c, c.pick(8192, 19)),
    "add_rms_norm, 64 tokens": lambda c: elementwise_cases.add_rms_norm(c, c.pick(64, 3)),
    "add_rms_norm, 8k tokens": lambda c: elementwise_cases.add_rms_norm(c, c.pick(8192, 19)),
    "swiglu, 64 tokens": lambda c: elementwise_cases.swiglu(c, c.pick(64, 3)),
    "swiglu, 8k tokens": lambda c: elementwise_cases.swiglu(c, c.pick(8192, 19)),
    "sampling, greedy": sampling_cases.greedy,
    "sampling, top-k 50 top-p 0.95": lambda c: sampling_cases.filtered(c, c.pick(50, 9), 0.95),
    "sampling, top-p 0.95": lambda c: sampling_cases.filtered(c, 0, 0.95),
    "token_bitmask": lambda c: sampling_cases.bitmask(c, torch.float32),
    "mla_decode, 16 heads, fp8": lambda c: mla_cases.decode(c, c.pick(16, 3), fp8=True),
    "mla_decode, 128 heads, fp8": lambda c: mla_cases.decode(c, c.pick(128, 6), fp8=True),
    "mla_decode, 16 heads, page 64": lambda c: mla_cases.decode(c, c.pick(16, 3), page_size=64),
    "paged_decode, 64 x 4k, d64": lambda c: attention_cases.decode(c, *c.pick((64, 4096, LLAMA_1B), (2, 24, SMOKE))),
    "rms_norm, 8k tokens": lambda c: elementwise_cases.rms_norm(c, c.pick(8192, 19)),
}
TARGETS = {
    "paged_decode, 64 x 4k": "paged_decode_bandwidth",
    "mla_decode, 16 heads": "mla_decode_bandwidth",
    "paged_prefill, 8k causal": "prefill_gemm_rate",
}


def cases(ctx: Context) -> list[Case]:
    """One case for each problem; all of its forms in it."""
    return [Case(name, lambda ctx, name=name: run(ctx, name), limit=45) for name in CASES]


def run(ctx: Context, name: str) -> None:
    """Build, check and time."""
    torch.manual_seed(0)
    measure(ctx, CASES[name](ctx), TARGETS.get(name, ""))
