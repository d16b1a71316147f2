"""Tiny models of random weights, one for each family, in which nothing is trivial.

Windows are so small that they matter, norms are not one, biases and sinks not zero, soft caps on, and logits spread far
apart: greedy output is varied and near ties are improbable. Knows nothing of the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 256
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_HEAD_DIM = {"head_dim": 24}  # not hidden_size / num_attention_heads
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_MIXED_WINDOW = {"layer_types": _MIXED, "sliding_window": WINDOW}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROPE_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_ROPE_LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}  # fmt: skip
_ROPE_YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    }
}  # fmt: skip
_ROPE_LONG = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 128, "factor": 2.0, "partial_rotary_factor": 0.5,
    }
}  # fmt: skip

_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
_MLA_MOE: dict[str, Any] = {
    **_MLA,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
_Q_LORA = {"q_lora_rank": 24}
_MLA_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.8,
        "mscale_all_dim": 0.6,
        "beta_fast": 32,
        "beta_slow": 1,
    }
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_rope3": ("llama", {**_ROPE_LLAMA3, **_HEAD_DIM}),
    "llama_eager": ("llama", {"attn_implementation": "eager"}),
    "llama_yarn": ("llama", _ROPE_YARN),
    "mistral": ("mistral", {"sliding_window": WINDOW, **_HEAD_DIM}),
    "ministral": ("ministral", {**_MIXED_WINDOW, **_HEAD_DIM}),
    "qwen2": ("qwen2", {"use_sliding_window": True, **_MIXED_WINDOW}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}),
    "qwen3": ("qwen3", {"use_sliding_window": True, **_MIXED_WINDOW, **_HEAD_DIM}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, **_HEAD_DIM}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "gemma": ("gemma", {**_HEAD_DIM, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            **_HEAD_DIM, **_MIXED_WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 12.0, "attn_implementation": "eager",
        },
    ),
    "gemma2_default": ("gemma2", {**_HEAD_DIM, **_MIXED_WINDOW, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_HEAD_DIM, **_MIXED_WINDOW, "query_pre_attn_scalar": 20}),
    "vaultgemma": ("vaultgemma", {**_HEAD_DIM, **_MIXED_WINDOW, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}),
    "phi": ("phi", _ROPE_PARTIAL),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3_longrope": ("phi3", {**_ROPE_LONG, "head_dim": 24, "num_attention_heads": 4, "hidden_size": 96}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {**_HEAD_DIM, **_MIXED_WINDOW, **_ROPE_YARN, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmo": ("olmo", {"clip_qkv": 1.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _MIXED_WINDOW),
    "olmoe": ("olmoe", {**_MOE, "clip_qkv": 1.0}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 2.0,
        },
    ),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "smollm3": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, **_MIXED_WINDOW},
    ),
    "cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": ("cohere2", {**_MIXED_WINDOW, **_HEAD_DIM, "logit_scale": 0.5}),
    "glm": ("glm", {"head_dim": 16, "attention_bias": True, **_ROPE_PARTIAL}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True, **_ROPE_PARTIAL}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW, "use_bias": True}),
    "gpt_neox": ("gpt_neox", _ROPE_PARTIAL),
    "exaone4": ("exaone4", {**_MIXED_WINDOW, **_HEAD_DIM}),
    "deepseek_v2": ("deepseek_v2", _MLA_MOE),
    "deepseek_v2_groups": (
        "deepseek_v2", {**_MLA_MOE, **_Q_LORA, **_MLA_YARN, "topk_method": "group_limited_greedy", "norm_topk_prob": True}
    ),
    "deepseek_v3": ("deepseek_v3", {**_MLA_MOE, **_Q_LORA}),
    "deepseek_v3_halves": ("deepseek_v3", {**_MLA_MOE, "rope_interleave": False, "attention_bias": True}),
    "deepseek_v3_yarn": ("deepseek_v3", {**_MLA_MOE, **_Q_LORA, **_MLA_YARN, "routed_scaling_factor": 2.0}),
    "axk1": ("axk1", {**_MLA_MOE, **_Q_LORA}),
    "glm4_moe_lite": ("glm4_moe_lite", {**_MLA_MOE, **_Q_LORA}),
    "minicpm3": ("minicpm3", {**_MLA, **_Q_LORA, "scale_emb": 2, "scale_depth": 2.0}),
    "youtu": ("youtu", {**_MLA, **_Q_LORA}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}  # fmt: skip

SLIDING = tuple(name for name, (_, options) in FAMILIES.items() if options.get("sliding_window") == WINDOW)


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fresh model of a family in eval mode. The same arguments give the same weights.

    Args:
        family: a key of `FAMILIES`.
        dtype: of its weights, rounded from the fp32 ones.
        seed: of its weights; the global random state is left as it was.
        overrides: configuration fields.
    """
    model_type, options = FAMILIES[family]
    options = {**_COMMON, **options, **overrides}
    implementation = options.pop("attn_implementation", None)
    config = AutoConfig.for_model(model_type, **options)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        _scatter(model)
    finally:
        torch.set_rng_state(state)
    return model.to(dtype).eval()


@torch.no_grad()
def _scatter(model: PreTrainedModel) -> None:
    """Make every parameter matter: matrices large enough for sharp attention and distant logits, vectors off 0 and 1."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            fan_in = parameter.shape[-1]
            parameter.copy_(noise * 1.5 * fan_in**-0.5)
        else:
            parameter.add_(noise * 0.2)
    model.get_input_embeddings().weight.copy_(torch.randn_like(model.get_input_embeddings().weight))


def left_padded(lengths: list[int], seed: int = 0, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of these lengths as a left-padded batch: input_ids and attention_mask, [len(lengths), max] int64.

    Ids are drawn from 3 on, so that pad, bos and eos stay out.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, width - length :] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        mask[row, width - length :] = 1
    return input_ids, mask
