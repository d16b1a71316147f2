"""transformers' pipeline and ours over the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

import hf_accel
from hf_accel.demo.model import shipped_model
from hf_accel.pipeline import AcceleratedPipeline

from .prompts import load


@pytest.fixture(scope="module")
def plain():
    model, tokenizer = load()
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def ours():
    pipe = AcceleratedPipeline(shipped_model(), dtype=torch.float32, engine_config={"num_pages": 512})
    yield pipe
    hf_accel.unpatch(pipe.model)


@pytest.fixture
def calls(ours, monkeypatch):
    """Shapes of the prompts that reached `generate`."""
    seen = []
    generate = ours.model.generate

    def recording(input_ids=None, **kwargs):
        seen.append(None if input_ids is None else tuple(input_ids.shape))
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(ours.model, "generate", recording)
    return seen
