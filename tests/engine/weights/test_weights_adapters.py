"""The weight version under PEFT: adapters added, switched, scaled, merged, trained."""

from __future__ import annotations

import pytest
import torch

from hf_accel.engine import weights
from hf_accel.engine.weights import WeightTracker

peft = pytest.importorskip("peft")


@pytest.fixture
def lora(tiny_llama):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_llama, config).eval()


def test_adding_an_adapter(tiny_llama):
    tracker = WeightTracker(tiny_llama)
    first = tracker.version()
    tiny_llama.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "a")
    second = tracker.version()
    tiny_llama.add_adapter(peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False), "b")
    third = tracker.version()
    tiny_llama.delete_adapter("b")
    assert len({first, second, third, tracker.version()}) == 4


def test_adapter_off_and_on_again(tiny_llama):
    tiny_llama.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "a")
    tracker = WeightTracker(tiny_llama)
    on = tracker.version()
    tiny_llama.disable_adapters()
    off = tracker.version()
    tiny_llama.enable_adapters()
    assert tracker.version() == on != off
    tiny_llama.disable_adapters()
    assert tracker.version() == off


def test_peft_disable_context(lora):
    tracker = WeightTracker(lora)
    on, weights_on = tracker.version(), tracker.weights_version()
    with lora.disable_adapter():
        assert tracker.version() != on
        assert tracker.weights_version() == weights_on
    assert tracker.version() == on


def test_set_adapter_and_back(lora):
    lora.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tracker = WeightTracker(lora.base_model.model)
    first = tracker.version()
    lora.set_adapter("second")
    second = tracker.version()
    lora.set_adapter("default")
    assert tracker.version() == first != second


def test_adapter_scale(lora):
    tracker = WeightTracker(lora)
    first = tracker.version()
    layer = next(m for m in lora.modules() if hasattr(m, "set_scale"))
    layer.set_scale("default", 3.0)
    second = tracker.version()
    layer.set_scale("default", 1.0)
    assert tracker.version() == first != second


def test_merge_and_unmerge(lora):
    tracker = WeightTracker(lora)
    first, weights_first = tracker.version(), tracker.weights_version()
    lora.merge_adapter()
    second, weights_second = tracker.version(), tracker.weights_version()
    lora.unmerge_adapter()
    assert len({first, second, tracker.version()}) == 3
    assert len({weights_first, weights_second, tracker.weights_version()}) == 3


def test_merge_of_an_adapter_too_small_to_show_in_the_sample(lora):
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    tracker = WeightTracker(lora)
    before = tracker.weights_version()
    lora.merge_adapter()
    assert tracker.weights_version() != before


def test_unloading_the_adapters(lora):
    tracker = WeightTracker(lora.base_model.model)
    before = tracker.version()
    lora.unload()
    assert tracker.version() != before


def test_adapter_training_step(lora):
    tracker = WeightTracker(lora)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], fused=True)
    lora(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    before = tracker.version()
    optimizer.step()
    assert tracker.version() != before


def test_memory_of_adapter_states_is_bounded(lora, monkeypatch):
    monkeypatch.setattr(weights, "_MAX_ADAPTER_STATES", 4)
    tracker = WeightTracker(lora)
    layer = next(m for m in lora.modules() if hasattr(m, "set_scale"))
    seen = set()
    for scale in range(1, 20):
        layer.set_scale("default", float(scale))
        seen.add(tracker.version())
    assert len(seen) == 19 and len(tracker._adapter_states) <= 4
