"""The model of most tests."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM


def make_tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A Llama of random fp32 weights in eval mode: 2 layers, hidden 64, 4 query heads, 2 KV heads, 256 tokens."""
    options: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).eval()
