"""Fixtures shared by all tests: no downloads, no network, tiny models of random weights."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a module with kernels is imported

from transformers import AutoTokenizer

import hf_accel

from .tiny import make_tiny_llama

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end: the collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """The interpreter takes everything apart as usual."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _constraint_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled constraints are kept for this run, and not among the user's."""
    folder = tmp_path_factory.mktemp("constraints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_accel.structured.compiler.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The shipped model's."""
    return AutoTokenizer.from_pretrained(Path(hf_accel.__file__).parent / "demo_model")


@pytest.fixture
def model(tokenizer: Any) -> torch.nn.Module:
    """A `tiny_llama` over the whole vocabulary of `tokenizer`, its width padded, that knows its eos and pad."""
    made = make_tiny_llama(vocab_size=len(tokenizer) + 7)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.generation_config.pad_token_id = tokenizer.pad_token_id
    return made


@pytest.fixture
def tiny_llama() -> torch.nn.Module:
    """A fresh Llama of random fp32 weights in eval mode: 2 layers, hidden 64, 4 query heads, 2 KV heads, 256 tokens."""
    return make_tiny_llama()
