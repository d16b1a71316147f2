"""Fixtures shared by all tests: no downloads, no network, tiny models of random weights."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a module with kernels is imported

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


@pytest.fixture
def tiny_llama() -> torch.nn.Module:
    """A fresh Llama of random fp32 weights in eval mode: 2 layers, hidden 64, 4 query heads, 2 KV heads, 256 tokens."""
    return make_tiny_llama()
