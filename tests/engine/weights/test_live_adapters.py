"""Adapters change under a prompt whose old KV is in the cache: the next call is right, and what still holds is reused."""

from __future__ import annotations

import pytest
import torch

from .ways import backward, hf_tokens, make_llama

# -- adapters --


@pytest.fixture
def lora(way):
    """A model with two random adapters, 'one' active, and our answers on it."""
    peft = pytest.importorskip("peft")
    model = make_llama()
    config = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name="one").eval()
    wrapped.add_adapter("two", peft.LoraConfig(**config))
    return wrapped, way(wrapped)


def cached_tokens(ours) -> int:
    return ours.engine.stats().num_cached_tokens


def test_switching_adapters_hits_the_old_cache_again(lora):
    model, ours = lora
    answers = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        answers[name] = hf_tokens(model.base_model.model)
        assert ours.tokens() == answers[name]
    assert answers["one"] != answers["two"]
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        before = cached_tokens(ours)
        assert ours.tokens() == answers[name]
        assert cached_tokens(ours) - before == 40  # the prompt's full pages


def test_disabling_an_adapter_and_enabling_it_again(lora):
    model, ours = lora
    active = hf_tokens(model.base_model.model)
    assert ours.tokens() == active
    with model.disable_adapter():
        base = hf_tokens(model.base_model.model)
        assert base != active
        assert ours.tokens() == base
    before = cached_tokens(ours)
    assert ours.tokens() == active
    assert cached_tokens(ours) > before


def test_merging_and_unmerging(lora):
    model, ours = lora
    assert ours.tokens() == hf_tokens(model.base_model.model)
    model.merge_adapter()
    assert ours.tokens() == hf_tokens(model.base_model.model)
    model.unmerge_adapter()
    assert ours.tokens() == hf_tokens(model.base_model.model)


def test_training_an_adapter(lora):
    model, ours = lora
    before = ours.tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, fused=True)
    backward(model)
    optimizer.step()
    assert ours.tokens() == hf_tokens(model.base_model.model) != before


def test_merge_and_unload(lora):
    model, ours = lora
    adapted = ours.tokens()
    base = model.merge_and_unload()
    assert ours.tokens() == hf_tokens(base) == adapted


def test_adding_an_adapter_to_a_model_in_use(way):
    peft = pytest.importorskip("peft")
    model = make_llama()
    ours = way(model)
    before = hf_tokens(model)
    assert ours.tokens() == before
    peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    )
    assert ours.tokens() == hf_tokens(model) != before
