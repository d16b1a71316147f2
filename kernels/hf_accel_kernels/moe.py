"""Routed experts of a mixture-of-experts layer: the typed contract, and which form computes it.

CPU tensors go to the C++ op (`cpu/moe.cpp`), which reads the weights of the chosen experts only, where they lie; everything
else to plain torch operations. Owns validation and dispatch. Knows tensors only: no router, no model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .cpu.moe import DTYPES, CpuMoe

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


MATRIX_TOKENS = {torch.float32: 128, torch.bfloat16: 24, torch.float16: 24}
"""Tokens per expert, on average, from which CPU runs matrix products by expert instead (bfloat16: unless it has matrix tiles)."""


def moe_experts(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: str = "silu",
) -> torch.Tensor:
    """For each token the weighted sum, over the experts chosen for it, of down(act(gate x) * up x).

    Rounded like the chain of tensor operations: each product, the activation and what it multiplies to hidden's dtype,
    the weighted outputs to the dtype that hidden and expert_weights promote to; their sum is float32, in the order of the
    experts, and then rounded. Not differentiable. In the C++ op a token's float32 result does not depend on the others.

    Args:
        hidden: [num_tokens, hidden_size], floating, any strides.
        expert_ids: [num_tokens, top_k] int64; an id >= num_experts stands for an expert held elsewhere and adds nothing.
        expert_weights: [num_tokens, top_k] floating.
        gate_up: [num_experts, 2 * intermediate_size, hidden_size] of hidden's dtype, the gate's rows first.
        down: [num_experts, hidden_size, intermediate_size] of hidden's dtype.
        activation: of the gate: one of `ACTIVATIONS`.

    Returns:
        [num_tokens, hidden_size] of hidden's dtype.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an unknown activation, or a negative id.
        MemoryError: no room for the intermediate activations.
    """
    _check(hidden, expert_ids, expert_weights, gate_up, down, activation)
    cpu = _cpu_ops() if hidden.device.type == "cpu" and hidden.dtype in DTYPES else None
    if cpu is None or not _pays(cpu, hidden.dtype, expert_ids.numel(), down.shape[0]):
        return _by_expert(hidden, expert_ids, expert_weights, gate_up, down, activation)
    out = torch.empty(hidden.shape, dtype=hidden.dtype)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    round_weighted = expert_weights.dtype == hidden.dtype
    weights = expert_weights.float().contiguous()
    gate_up, down = gate_up.contiguous(), down.contiguous()
    cpu.experts(hidden, expert_ids.contiguous(), weights, gate_up, down, activation, round_weighted, out)
    return out


def _pays(cpu: CpuMoe, dtype: torch.dtype, num_pairs: int, num_experts: int) -> bool:
    """Whether the C++ op beats matrix products by expert."""
    has_tiles = dtype == torch.bfloat16 and cpu.tile_tokens > 0
    return has_tiles or num_pairs < MATRIX_TOKENS[dtype] * num_experts


def _by_expert(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """The torch form: two matrix products for each expert that was chosen."""
    num_experts, top_k = down.shape[0], expert_ids.shape[1]
    ids, order = expert_ids.flatten().sort(stable=True)
    if ids.numel() and int(ids[0]) < 0:
        raise ValueError("an expert id is negative")
    counts = torch.bincount(ids.clamp(max=num_experts), minlength=num_experts).tolist()
    tokens = order // top_k
    weights = expert_weights.flatten()[order].unsqueeze(1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    first = 0
    for expert, count in enumerate(counts[:num_experts]):
        if count:
            rows = slice(first, first + count)
            gate, up = F.linear(hidden[tokens[rows]], gate_up[expert]).chunk(2, dim=1)
            y = F.linear(ACTIVATIONS[activation](gate) * up, down[expert]) * weights[rows]
            out.index_add_(0, tokens[rows], y.to(wide))
        first += count
    return out.to(hidden.dtype)


@functools.cache
def _cpu_ops() -> CpuMoe | None:
    try:
        return CpuMoe()
    except RuntimeError:
        return None


def _check(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if hidden.ndim != 2 or down.ndim != 3 or gate_up.ndim != 3:
        raise ValueError(
            "hidden must be [num_tokens, hidden_size], gate_up and down [num_experts, rows, columns]; got "
            f"{tuple(hidden.shape)}, {tuple(gate_up.shape)}, {tuple(down.shape)}"
        )
    num_experts, hidden_size, intermediate_size = down.shape
    if hidden.shape[1] != hidden_size or gate_up.shape != (num_experts, 2 * intermediate_size, hidden_size):
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and gate_up {tuple(gate_up.shape)} do not fit down {tuple(down.shape)} "
            "= [num_experts, hidden_size, intermediate_size]"
        )
    if expert_ids.ndim != 2 or expert_ids.shape[0] != hidden.shape[0] or expert_weights.shape != expert_ids.shape:
        raise ValueError(
            f"expert_ids {tuple(expert_ids.shape)} and expert_weights {tuple(expert_weights.shape)} must be "
            f"[num_tokens, top_k] for {hidden.shape[0]} tokens"
        )
    if expert_ids.dtype != torch.int64 or not expert_weights.is_floating_point():
        raise ValueError(
            f"expert_ids must be int64, not {expert_ids.dtype}, and expert_weights floating, not {expert_weights.dtype}"
        )
    if not hidden.dtype == gate_up.dtype == down.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden, gate_up and down must share a floating dtype, not {hidden.dtype}, {gate_up.dtype}, {down.dtype}"
        )
    if not hidden.device == expert_ids.device == expert_weights.device == gate_up.device == down.device:
        raise ValueError("hidden, expert_ids, expert_weights, gate_up and down must be on one device")
