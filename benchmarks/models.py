"""The models of the benchmarks: dimensions by name, seeded weights, and the token ids their prompts are cut from.

Owns every shape literal of the side-by-side runs. Knows neither workloads nor arms.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

MODEL_SEED = 0
CORPUS_SEED = 1
NUM_CORPUS_TOKENS = 1 << 15

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

NAMES = (*DIMENSIONS, "demo")


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
    config = LlamaConfig(**DIMENSIONS[name], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        model = LlamaForCausalLM(config).to(dtype)
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
