"""The demo tokenizer, and models of random weights over its whole vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import hf_accel
from hf_accel.structured import compiler

from ..tiny import make_tiny_llama


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(hf_accel.__file__).parent / "demo_model")


@pytest.fixture
def model(tokenizer):
    """Its width is padded."""
    model = make_tiny_llama(vocab_size=len(tokenizer) + 7)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path_factory.getbasetemp() / "constraints")
