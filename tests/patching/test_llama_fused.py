"""The fused CPU step against HF's own forward: every admitted family, chunked and mixed batches, changed weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_accel.patching.llama import FusedDecoderModel, fused_decoder_for

from ..cpp_ops import needs_cpp_ops
from .fused_models import MODELS, PAGE_SIZE, VOCAB, fuse, fused_logits, make

pytestmark = needs_cpp_ops


def sequences() -> list[torch.Tensor]:
    return [torch.randint(0, VOCAB, (length,)) for length in (26, 9, 18)]


def assert_same(fused: FusedDecoderModel, model: nn.Module, tolerance: float = 1e-5) -> None:
    batch = sequences()
    for logits, ids in zip(fused_logits(fused, model, batch), batch):
        with torch.no_grad():
            expected = model(ids.unsqueeze(0)).logits[0].float()
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_the_models_own_forward(name: str) -> None:
    model = make(name)
    assert_same(fuse(model), model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "granite"])
def test_bfloat16_differs_by_rounding_only(name: str) -> None:
    model = make(name, torch.bfloat16)
    wide = make(name).to(torch.bfloat16).float()
    batch = sequences()
    for logits, ids in zip(fused_logits(fuse(model), model, batch), batch):
        with torch.no_grad():
            exact, own = wide(ids.unsqueeze(0)).logits[0], model(ids.unsqueeze(0)).logits[0].float()
        assert (logits - exact).norm() < 1.5 * (own - exact).norm() + 1e-3 * exact.norm()
        assert torch.equal(logits, logits.bfloat16().float())


def test_the_model_is_left_alone() -> None:
    model = make()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    assert_same(fuse(model), model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
    assert all(p is weights[name][0] and torch.equal(p, weights[name][1]) for name, p in model.named_parameters())


def test_rope_tables_grow_with_the_sequence() -> None:
    model = make()
    fused, _ = fused_decoder_for(model, page_size=PAGE_SIZE, max_positions=5)
    assert fused is not None
    assert_same(fused, model)


def test_a_deleted_model_is_freed() -> None:
    model = make()
    fused, ref = fuse(model), weakref.ref(model)
    gc.collect()
    del model
    gc.collect()
    assert ref() is None
    assert fused.refresh() == "the model is gone"


@pytest.mark.parametrize("name", ["llama", "llama tied, biased", "qwen3"])
def test_refresh_follows_the_weights(name: str) -> None:
    model = make(name)
    fused, ids = fuse(model), sequences()
    stale = fused_logits(fused, model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter))
    assert fused.refresh() == ""
    assert_same(fused, model)
    assert (fused_logits(fused, model, ids)[0] - stale[0]).abs().max() > 1e-2


def test_refresh_by_name_takes_each_parameter() -> None:
    model = make("llama tied, biased")
    fused = fuse(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter))
        assert fused.refresh({name}) == ""
        assert_same(fused, model)


def test_refresh_follows_new_storage() -> None:
    model = make()
    fused = fuse(model)
    model.model.embed_tokens.weight.data = torch.randn(VOCAB, 48)
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 48))
    assert fused.refresh() == ""
    assert_same(fused, model)
