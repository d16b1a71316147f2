"""What weight changes leave of the parameters' places when layers run through the loop for devices, here on CPU."""

from __future__ import annotations

import pytest
import torch

import hf_accel

from ...patching.test_fused_parameters import own_storages
from .test_live_weights import CHANGES
from .ways import ON_DEVICE, ByHand, Generate, hf_tokens, make_llama

LAYERS_OWN_CODE = {  # and the new modules of `replace_linear` and `more_tokens` are in training mode
    "replace_linear_by_a_subclass", "replace_activation", "add_biases", "smaller_mlp", "replace_linear", "more_tokens",
}  # fmt: skip


def device_forward(engine):
    return engine.core.executor.runner._device_forward


def has_strays(engine) -> bool:
    return any(group.strays() for fused in device_forward(engine)._fused for group in fused.values())


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_views_again_or_never(change):
    model = make_llama()
    ours = ByHand(model, **ON_DEVICE)
    ours.tokens()
    assert not has_strays(ours.engine)
    CHANGES[change](model)
    expected = hf_tokens(model)
    assert ours.tokens() == expected
    if change in LAYERS_OWN_CODE:
        assert device_forward(ours.engine) is None
        assert own_storages(model)
    else:
        assert not has_strays(ours.engine)
    ours.engine.shutdown()
    assert own_storages(model)
    assert hf_tokens(model) == expected


def test_moving_is_no_weight_change():
    model = make_llama()
    ours = Generate(model, **ON_DEVICE)
    expected = ours.tokens()
    assert ours.tokens() == expected
    cached = ours.engine.stats().num_cached_tokens
    assert cached > 0
    handle = model.model.norm.register_forward_hook(lambda module, args, output: None)
    assert ours.tokens() == expected
    assert device_forward(ours.engine) is None and own_storages(model)
    handle.remove()
    cached = ours.engine.stats().num_cached_tokens
    assert ours.tokens() == expected
    assert device_forward(ours.engine) is not None
    assert ours.engine.stats().num_cached_tokens > cached


def test_sleep_and_unpatch_give_the_parameters_memory_of_their_own():
    model = make_llama()
    ours = Generate(model, **ON_DEVICE)
    expected = ours.tokens()
    assert not own_storages(model)
    ours.engine.sleep()
    assert own_storages(model)
    assert ours.tokens() == expected
    assert not own_storages(model)
    model.lm_head.weight.data.neg_()
    ours.engine.sleep()
    expected = hf_tokens(model)
    assert ours.tokens() == expected
    hf_accel.unpatch(model)
    assert own_storages(model)
    assert hf_tokens(model) == expected


def test_two_engines_on_one_model():
    model = make_llama()
    first, second = ByHand(model, **ON_DEVICE), ByHand(model, **ON_DEVICE)
    expected = hf_tokens(model)
    assert first.tokens() == second.tokens() == expected
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-3)
    changed = hf_tokens(model)
    assert first.tokens() == second.tokens() == changed != expected
    first.engine.shutdown()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1 / 3)
    assert second.tokens() == expected
    second.engine.shutdown()
    assert own_storages(model)


def test_a_new_dtype():
    model = make_llama()
    ours = ByHand(model, **ON_DEVICE)
    ours.tokens()
    model.to(torch.bfloat16)
    assert own_storages(model)
    ours.tokens()
    assert device_forward(ours.engine) is not None and not own_storages(model)
    ours.engine.shutdown()
    assert own_storages(model)
