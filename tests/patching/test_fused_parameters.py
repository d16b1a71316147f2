"""Parameters that became views: nothing that a user does with a model shows it, and `close` leaves no trace."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from hf_accel.patching.llama_device import device_forward_for

from .fused_models import VOCAB, DeviceSteps, make, on_device
from .test_llama_device import assert_same
from .test_llama_fused_refusals import (
    REASONS,
    REFUSED,
    changed_rope,
    changed_scale,
    new_layer_order,
    removed_layer,
)

NAME = "llama tied, biased"


def own_storages(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    return len(storages) == len(parameters) and all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)


@pytest.fixture
def model() -> nn.Module:
    return make(NAME)


@pytest.fixture
def twin() -> nn.Module:
    return make(NAME)


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    a_state, b_state = a.state_dict(), b.state_dict()
    assert list(a_state) == list(b_state)
    for name, tensor in a_state.items():
        assert torch.equal(tensor, b_state[name]) and tensor.stride() == b_state[name].stride(), name


def test_modules_parameters_and_values_stay(model: nn.Module, twin: nn.Module) -> None:
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    device_forward = on_device(model)
    assert not own_storages(model)
    for _ in range(2):
        assert_equal_weights(model, twin)
        assert all(p is parameters[name] and p.is_leaf and p._base is None for name, p in model.named_parameters())
        for name, module in model.named_modules():
            assert all(module.__dict__[key] is value for key, value in before[name].items())
        device_forward.close()
    assert own_storages(model)


def test_each_weight_is_held_once(model: nn.Module) -> None:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    on_device(model)
    after = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(after.values()) == sum(storages.values()) and len(after) < len(storages)


def test_training_is_the_same(model: nn.Module, twin: nn.Module) -> None:
    ids = torch.randint(0, VOCAB, (2, 7))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin)]
    steps = DeviceSteps(on_device(model))
    for _ in range(2):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            m(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal_weights(model, twin)
        assert_same(steps, model)


def test_copies_are_models_of_their_own(model: nn.Module, twin: nn.Module) -> None:
    on_device(model)
    copied = copy.deepcopy(model)
    assert own_storages(copied)
    with torch.no_grad():
        copied.model.layers[0].self_attn.k_proj.weight.add_(1)
    assert_equal_weights(model, twin)


def test_saved_and_loaded_again(model: nn.Module, twin: nn.Module, tmp_path: Path) -> None:
    sizes = []
    for m in (twin, model):
        if m is model:
            on_device(m)
        buffer = io.BytesIO()
        torch.save(m.state_dict(), buffer)
        sizes.append(buffer.tell())
        buffer.seek(0)
        loaded = make(NAME, initializer_range=0.5)
        loaded.load_state_dict(torch.load(buffer))
        assert_equal_weights(loaded, twin)
    assert abs(sizes[0] - sizes[1]) < 0.1 * sizes[0]
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    assert all(
        torch.equal(v, state[k]) for k, v in safetensors.torch.load_file(tmp_path / "weights.safetensors").items()
    )
    model.save_pretrained(tmp_path / "model")
    assert_equal_weights(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model"), twin)


def test_a_loaded_pickle_is_used_as_it_lies(model: nn.Module) -> None:
    on_device(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    addresses = [p.data_ptr() for p in loaded.parameters()]
    device_forward = on_device(loaded)
    assert_same(DeviceSteps(device_forward), loaded)
    device_forward.close()
    assert addresses == [p.data_ptr() for p in loaded.parameters()]


def test_two_loops_over_one_model(model: nn.Module) -> None:
    first, second = on_device(model), on_device(model)
    assert_same(DeviceSteps(second), model)
    first.close()
    assert own_storages(model)
    assert second.refresh() == ""
    assert_same(DeviceSteps(second), model)


def test_close_leaves_what_the_user_replaced(model: nn.Module) -> None:
    device_forward = on_device(model)
    attention = model.model.layers[0].self_attn
    replaced = nn.Parameter(torch.randn_like(attention.q_proj.weight))
    attention.q_proj.weight = replaced
    other = attention.k_proj.weight.data = torch.randn_like(attention.k_proj.weight)
    address = other.data_ptr()
    model.model.layers[1].mlp.up_proj = nn.Linear(48, 80)
    del model.model.layers[2].mlp.gate_proj
    device_forward.close()
    assert attention.q_proj.weight is replaced and attention.k_proj.weight.data_ptr() == address
    del other
    assert own_storages(model)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def shared_between_layers(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def memory_of_another_model(model: nn.Module) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight
    other = nn.Parameter(torch.randn_like(weight))
    model.others = [other]
    weight.data = other.data


def transposed(model: nn.Module) -> None:
    weight = model.model.layers[1].self_attn.k_proj.weight
    weight.data = torch.randn(weight.shape[1], weight.shape[0]).T


def norm_with_gaps(model: nn.Module) -> None:
    model.model.layers[2].input_layernorm.weight.data = torch.randn(96)[::2]


def biases_of_some(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.bias = None


REASONS_HERE = REASONS | {
    shared_between_layers: "are one parameter", memory_of_another_model: "shares the memory of", transposed: "not contiguous",
    norm_with_gaps: "not contiguous", biases_of_some: "only some of",
}  # fmt: skip
ONLY_HERE = [change for change in REASONS_HERE if change not in REASONS]


@pytest.mark.parametrize("change", [*REFUSED, *ONLY_HERE], ids=lambda f: f.__name__)
def test_refused_from_the_start(model: nn.Module, change: Any) -> None:
    change(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    device_forward, reason = device_forward_for(model, max_positions=64)
    assert device_forward is None
    assert REASONS_HERE[change] in reason
    assert addresses == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize(
    "change",
    [*REFUSED, removed_layer, changed_scale, changed_rope, new_layer_order, *ONLY_HERE],
    ids=lambda f: f.__name__,
)
def test_noticed_later(model: nn.Module, change: Any) -> None:
    device_forward = on_device(model)
    assert device_forward.refresh() == ""
    change(model)
    assert device_forward.why_not_valid(model) or device_forward.refresh()
    device_forward.close()


def test_autocast_and_other_models_are_noticed(model: nn.Module, twin: nn.Module) -> None:
    device_forward = on_device(model)
    assert device_forward.why_not_valid(model) == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in device_forward.why_not_valid(model)
    assert "another model" in device_forward.why_not_valid(twin)


def test_without_memory_nothing_has_moved(model: nn.Module, twin: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    count, empty = 0, torch.empty

    def scarce(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > 6:
            raise torch.OutOfMemoryError
        return empty(*args, **kwargs)

    monkeypatch.setattr("hf_accel.patching.fused_parameters.torch.empty", scarce)
    device_forward, reason = device_forward_for(model, max_positions=64)
    monkeypatch.undo()
    assert device_forward is None and "no memory" in reason and count == 7
    assert own_storages(model)
    assert_equal_weights(model, twin)
