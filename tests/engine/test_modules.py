"""Linears that are not plain, and PEFT models: on the engine if it can, on the model's own layers or the original if not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.engine.patch import _patched
from hf_accel.patching import hooks

from ..cpp_ops import needs_cpp_ops
from .patched_calls import CONFIG, LENGTH, PROMPT, reasons, tokens

# -- linears that are not plain --


class PackedLinear(nn.Module):
    """A stand-in for a quantizer's module: no `weight`, int8 data and scales of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed.to(x.dtype) * self.scale).T


class ScaledWeight(torch.Tensor):
    """A tensor subclass whose values are not in its memory as such: `F.linear` gets them by `__torch_function__`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, *rest = args
            return func(x, weight.as_subclass(torch.Tensor) * 3.0, *rest)
        return super().__torch_function__(func, types, args, kwargs or {})


def replace_linears(model, make) -> None:
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))


def pack(model):
    replace_linears(model, PackedLinear)


def subclass_weight(model):
    def make(linear):
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(ScaledWeight), requires_grad=False)
        return linear

    replace_linears(model, make)


def subclass_linear(model):
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.5

    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Half


def dynamic_int8(model):
    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    quantize(model.model.layers, {nn.Linear}, dtype=torch.qint8, inplace=True)


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [pack, subclass_weight, subclass_linear, dynamic_int8, torchao_int8])
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=needs_cpp_ops), "after, own layers"])
def test_linears_that_are_not_plain(tiny_llama, change, when):
    before = tokens(tiny_llama)
    if when != "before":
        hf_accel.patch(tiny_llama, fused=when == "after", **CONFIG)
        assert tokens(tiny_llama) == before
        assert hf_accel.get_engine(tiny_llama).core.executor.runner.fused == (when == "after")
    change(tiny_llama)
    expected = hf_tokens(tiny_llama)
    if when == "before":
        hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(tiny_llama) == expected
    assert tokens(tiny_llama) == expected
    assert reasons(tiny_llama) == {}
    assert not hf_accel.get_engine(tiny_llama).core.executor.runner.fused


def hf_tokens(model) -> list[list[int]]:
    """The original's answer, on the model itself (some quantized tensors cannot be copied)."""
    engine_run = _patched.pop(model, None)
    instances = hooks._instances.get(type(model), {})
    entry = instances.pop(id(model), None)
    try:
        return tokens(model)
    finally:
        if engine_run is not None:
            _patched[model] = engine_run
            instances[id(model)] = entry


# -- PEFT --


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("outer", [True, False], ids=["wrapper", "inner model"])
def test_lora_on_all_linears(tiny_llama, peft, outer):
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama, config).eval()
    expected = tokens(copy.deepcopy(model))
    assert hf_accel.patch(model if outer else tiny_llama, **CONFIG) is (model if outer else tiny_llama)
    assert hf_accel.is_patched(model)
    assert hf_accel.is_patched(tiny_llama)
    for _ in range(2):
        assert tokens(model) == expected
        assert tokens(tiny_llama) == expected
    assert reasons(model) == {}
    assert hf_accel.get_engine(model).stats().num_cached_tokens > 0
    hf_accel.unpatch(model)
    assert not hf_accel.is_patched(tiny_llama)
    assert tokens(model) == expected


def test_a_peft_model_as_context_manager(tiny_llama, peft):
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    with hf_accel.patch(model, **CONFIG) as same:
        assert same is model
        assert hf_accel.is_patched(model)
        tokens(model)
    assert not hf_accel.is_patched(model)
    assert "__enter__" not in vars(type(model))


def test_adapters_of_one_batch_fall_back(tiny_llama, peft):
    config = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(**config), adapter_name="one").eval()
    model.add_adapter("two", peft.LoraConfig(**config))
    expected = tokens(model, adapter_names=["one", "two"])
    hf_accel.patch(model, **CONFIG)
    tokens(model)
    assert tokens(model, adapter_names=["one", "two"]) == expected
    assert tokens(model, adapter_names=["two", "__base__"]) == tokens(
        copy.deepcopy(model), adapter_names=["two", "__base__"]
    )


def test_prompt_tuning_falls_back(tiny_llama, peft):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(tiny_llama, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    expected = tokens(model)
    hf_accel.patch(model, **CONFIG)
    assert tokens(model) == expected
    assert sum(reasons(model).values()) == 1
    plain = tokens(copy.deepcopy(tiny_llama))
    assert plain != expected
    assert tokens(tiny_llama) == plain  # the inner model alone, after PEFT put its method back
    assert (
        Engine(tiny_llama, **CONFIG)
        .generate([PROMPT[0]], SamplingParams(temperature=0, max_tokens=LENGTH))[0]
        .outputs[0]
        .token_ids
        == plain[0]
    )
