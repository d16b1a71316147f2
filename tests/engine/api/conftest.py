"""An engine in each of its forms over a model whose tokens vary."""

from __future__ import annotations

import pytest
import torch

from hf_accel import Engine

from .hf_answers import CONFIG


@pytest.fixture
def model(tiny_llama):
    """Weights large enough for sampling and greedy tokens that vary."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return tiny_llama


@pytest.fixture(
    params=[{}, {"max_prefill_chunk": 7}, {"fused": False}, {"overlap": True, "max_prefill_chunk": 7}],
    ids=["plain", "chunked", "own-layers", "overlap"],
)
def engine(model, byte_tokenizer, request, assert_idle):
    engine = Engine(model, byte_tokenizer, **CONFIG, **request.param)
    yield engine
    assert_idle(engine)
