"""Routed experts in float64, one token and one expert at a time: the oracle of `moe.moe_experts`. Knows tensors only."""

from __future__ import annotations

import torch

from hf_accel_kernels.moe import ACTIVATIONS


def moe_experts_reference(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: str = "silu",
) -> torch.Tensor:
    """Arguments as in `moe.moe_experts`; float64 [num_tokens, hidden_size], nothing rounded on the way."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(expert_ids.tolist(), expert_weights.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= down.shape[0]:
                continue
            gate, up = (gate_up[expert].double() @ hidden[token].double()).chunk(2)
            out[token] += weight * (down[expert].double() @ (ACTIVATIONS[activation](gate) * up))
    return out
