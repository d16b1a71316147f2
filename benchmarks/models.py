"""The models of the benchmarks: dimensions by name, seeded weights, and the token ids their prompts are cut from.

Owns every shape literal of the side-by-side runs. Knows neither workloads nor arms.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

MODEL_SEED = 0
CORPUS_SEED = 1
NUM_CORPUS_TOKENS = 1 << 15

_MLA_HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}  # as released

DIMENSIONS: dict[str, dict[str, Any]] = {
    "llama-100m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
"""Llama models of random weights; `demo` is the trained model that ships with the package.

Untied heads: a random tied model only repeats its last token, which would make equal outputs mean nothing.
"""

MLA_DIMENSIONS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite-3l": {
        **_MLA_HEADS,
        "model_type": "deepseek_v2",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 32,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "vocab_size": 8192,
        "max_position_embeddings": 16384,
    },
    "deepseek-v3-3l": {
        **_MLA_HEADS,
        "model_type": "deepseek_v3",
        "hidden_size": 768,
        "intermediate_size": 1536,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "q_lora_rank": 384,
        "n_routed_experts": 32,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "vocab_size": 8192,
        "max_position_embeddings": 16384,
    },
}
"""DeepSeek models with the released heads, and fewer layers, narrower hidden states and experts; random weights."""

NAMES = (*DIMENSIONS, *MLA_DIMENSIONS, "demo")


@dataclass
class BenchmarkModel:
    """A model and what prompts for it are made of.

    Attributes:
        name: one of `NAMES`.
        model: in evaluation mode; its generation config can never stop early.
        corpus: token ids that prompts are cut from: text for the demo model, uniform random ids for the others.
        max_positions: longest sequence it takes.
    """

    name: str
    model: Any
    corpus: list[int]
    max_positions: int


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> BenchmarkModel:
    """Make or load a model by name; the same name gives the same weights at every call.

    Raises:
        ValueError: the name is unknown, or the demo model is not there.
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(NAMES)}")
    model, corpus = _demo(dtype) if name == "demo" else _random(name, dtype)
    # No eos: every arm does the whole workload, and a random model ends nowhere by chance.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.config.eos_token_id = None
    return BenchmarkModel(name, model.eval().to(device), corpus, int(model.config.max_position_embeddings))


def _random(name: str, dtype: torch.dtype) -> tuple[Any, list[int]]:
    dimensions = {"model_type": "llama", **(DIMENSIONS | MLA_DIMENSIONS)[name]}
    config = AutoConfig.for_model(**dimensions, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    draw = random.Random(CORPUS_SEED)
    return model, [draw.randrange(3, config.vocab_size) for _ in range(NUM_CORPUS_TOKENS)]


def _demo(dtype: torch.dtype) -> tuple[Any, list[int]]:
    from pydoc_data.topics import topics

    from hf_accel.demo.model import load as load_demo

    model, tokenizer = load_demo(None, dtype)
    corpus: list[int] = []
    for _, text in sorted(topics.items()):
        corpus += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(corpus) >= NUM_CORPUS_TOKENS:
            break
    return model, corpus[:NUM_CORPUS_TOKENS]
