"""Models of real shapes with random weights that are made on the device, and the least that a step of theirs can take."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, initialization

from benchmarks.models import BenchmarkModel

SEED = 0
NUM_CORPUS_TOKENS = 1 << 16

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 16384,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 16384, "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 16384, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "vocab_size": 102400, "max_position_embeddings": 16384, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Published shapes; positions are cut to 16k, and Llama's scaling of rope is left out, as it costs nothing in a step."""

_SMALLER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 384, "kv_lora_rank": 48, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}  # fmt: skip


def dimensions(name: str, smoke: bool) -> dict[str, Any]:
    """A model's configuration; of the same form, but tiny, for smoke runs."""
    shape = dict(SHAPES[name])
    if smoke:
        shape |= {key: value for key, value in _SMALLER.items() if key in shape}
        if "kv_lora_rank" in shape:
            shape["num_key_value_heads"] = shape["num_attention_heads"]
    return shape


def make(name: str, device: torch.device, dtype: torch.dtype, smoke: bool) -> BenchmarkModel:
    """The model in evaluation mode, the same weights at every call; nothing of it passes through the CPU."""
    shape = dimensions(name, smoke)
    config = AutoConfig.for_model(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device(device), initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    model = model.to(device).eval()
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if key.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    draw = random.Random(SEED)
    corpus = [draw.randrange(3, config.vocab_size) for _ in range(NUM_CORPUS_TOKENS)]
    return BenchmarkModel(name, model, corpus, int(config.max_position_embeddings))


@dataclass(frozen=True)
class Costs:
    """Bytes and FLOPs of one forward of a model, counted from its parameters and its configuration.

    Attributes:
        dense_bytes: weights that every step reads.
        dense_flops: of one token in these weights, without the head.
        head_flops: of one token in the head.
        expert_bytes, expert_flops: of one routed expert, over all its layers (for a token, in FLOPs).
        num_experts, experts_per_token: routed.
        kv_bytes: of one token, over all layers.
        decode_flops: of one query against one cached token, over all layers; on latents, absorbed.
        prefill_flops: the same in prefill; with latents expanded to keys and values.
    """

    dense_bytes: float
    dense_flops: float
    head_flops: float
    expert_bytes: float
    expert_flops: float
    num_experts: int
    experts_per_token: int
    kv_bytes: float
    decode_flops: float
    prefill_flops: float

    def step(self, batch: int, context: float) -> tuple[float, float]:
        """Bytes and FLOPs of a decode step of `batch` rows, each with `context` tokens before it."""
        share = 1 - (1 - self.experts_per_token / self.num_experts) ** batch if self.num_experts else 0.0
        num_bytes = self.dense_bytes + share * self.num_experts * self.expert_bytes + batch * context * self.kv_bytes
        token = self.dense_flops + self.head_flops + self.experts_per_token * self.expert_flops
        return num_bytes, batch * (token + context * self.decode_flops)

    def prefill(self, num_tokens: int) -> tuple[float, float]:
        """Bytes and FLOPs of one prompt, with the logits of its last token."""
        token = self.dense_flops + self.experts_per_token * self.expert_flops
        flops = num_tokens * token + self.head_flops + num_tokens * (num_tokens + 1) / 2 * self.prefill_flops
        return self.dense_bytes + self.num_experts * self.expert_bytes + num_tokens * self.kv_bytes, flops


def costs(model: Any) -> Costs:
    """Counted from the modules themselves: what has two dimensions is a product, what has three is routed experts."""
    config = model.config
    head = model.get_output_embeddings().weight
    size = head.itemsize
    dense = routed = 0
    for parameter in model.parameters():
        if parameter is model.get_input_embeddings().weight or parameter is head:
            continue
        if parameter.ndim == 3:
            routed += parameter.numel()
        else:
            dense += parameter.numel()
    experts = int(getattr(config, "n_routed_experts", None) or 0) if routed else 0
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    rank = getattr(config, "kv_lora_rank", None)
    if rank:
        width = rank + config.qk_rope_head_dim
        kv, decode = width, 2 * heads * (width + rank)
        prefill = 2 * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv, decode = 2 * config.num_key_value_heads * head_dim, 4 * heads * head_dim
        prefill = decode
    return Costs(
        dense_bytes=(dense + head.numel()) * size,
        dense_flops=2 * dense,
        head_flops=2 * head.numel(),
        expert_bytes=routed * size / experts if experts else 0.0,
        expert_flops=2 * routed / experts if experts else 0.0,
        num_experts=experts,
        experts_per_token=int(getattr(config, "num_experts_per_tok", 0) or 0) if experts else 0,
        kv_bytes=layers * kv * size,
        decode_flops=layers * decode,
        prefill_flops=layers * prefill,
    )
