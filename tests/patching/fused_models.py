"""Tiny models for the fused decoder, and a run of one on pages of its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from hf_accel.attention.base import AttentionMetadata
from hf_accel.attention.torch_backend import TorchBackend
from hf_accel.patching.llama import FusedDecoderModel, fused_decoder_for
from hf_accel.patching.llama_device import DeviceForward, device_forward_for

VOCAB, PAGE_SIZE, NUM_PAGES = 97, 4, 64
BASE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied, biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn rope": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    }}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", {"sliding_window": 6, "layer_types": WINDOWED}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": WINDOWED}),
    "qwen3": ("Qwen3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "cwm": ("Cwm", {"sliding_window": 6, "layer_types": WINDOWED, "bos_token_id": 0, "eos_token_id": 1}),
    "seed_oss": ("SeedOss", {}),
    "granite": ("Granite", {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5, "attention_multiplier": 0.2,
    }),
}  # fmt: skip


def make(name: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    prefix, options = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**(BASE | options | overrides))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(8)
    return model


def fuse(model: nn.Module) -> FusedDecoderModel:
    fused, reason = fused_decoder_for(model, page_size=PAGE_SIZE, max_positions=64)
    assert fused is not None, reason
    return fused


def on_device(model: nn.Module, max_positions: int = 64) -> DeviceForward:
    device_forward, reason = device_forward_for(model, max_positions=max_positions)
    assert device_forward is not None, reason
    return device_forward


class DeviceSteps:
    """A device's loop, called as the fused CPU decoder is."""

    def __init__(self, device_forward: DeviceForward) -> None:
        self.device_forward, self.backend = device_forward, TorchBackend()

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, page_table: torch.Tensor,
        seq_lens: torch.Tensor, starts: torch.Tensor, indices: torch.Tensor, k_pages: Any, v_pages: Any,
    ) -> torch.Tensor:  # fmt: skip
        lens = (tuple(starts.diff().tolist()), tuple(seq_lens.tolist()))
        metadata = AttentionMetadata(page_table, seq_lens, starts, slots, *lens)
        self.device_forward.ensure_positions(max(lens[1]))
        return self.device_forward.forward(input_ids, positions, indices, self.backend, metadata, k_pages, v_pages)


class Pages:
    """A pool with scattered pages for a few sequences."""

    def __init__(self, model: nn.Module, sequences: list[torch.Tensor]) -> None:
        attention = model.model.layers[0].self_attn
        shape = (NUM_PAGES, attention.k_proj.out_features // attention.head_dim, PAGE_SIZE, attention.head_dim)
        pools = [torch.full(shape, 9.0, dtype=model.dtype) for _ in range(2 * len(model.model.layers))]
        self.k_pages, self.v_pages = pools[::2], pools[1::2]
        self.sequences, self.done = sequences, [0] * len(sequences)
        width = max(-(-len(s) // PAGE_SIZE) for s in sequences)
        self.table = torch.randperm(NUM_PAGES)[: width * len(sequences)].view(len(sequences), width).int()

    def step(self, fused: FusedDecoderModel | DeviceSteps, counts: list[int]) -> torch.Tensor:
        active = [i for i, count in enumerate(counts) if count]
        positions = [torch.arange(self.done[i], self.done[i] + counts[i]) for i in active]
        slots = [self.table[i].long()[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for i, p in zip(active, positions)]
        for i in active:
            self.done[i] += counts[i]
        starts = torch.tensor([0, *(counts[i] for i in active)]).cumsum(0).int()
        return fused.forward(
            torch.cat([self.sequences[i][p] for i, p in zip(active, positions)]), torch.cat(positions), torch.cat(slots),
            self.table[active], torch.tensor([self.done[i] for i in active]).int(), starts, torch.arange(int(starts[-1])),
            self.k_pages, self.v_pages,
        )  # fmt: skip


def fused_logits(
    fused: FusedDecoderModel | DeviceSteps, model: nn.Module, sequences: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Logits of each sequence, computed in chunks, decode steps and mixed batches."""
    pages = Pages(model, sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    for counts in ([14, 0, 3], [1, 6, 1], [1, 1, 0], [9, 1, 13], [1, 1, 1]):
        logits = pages.step(fused, counts)
        for part, chunk in zip(parts, logits.split(counts)):
            part.append(chunk)
    return [torch.cat(part) for part in parts]
