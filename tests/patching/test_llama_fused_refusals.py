"""What the fused decoder refuses, and what it notices later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_accel.patching.llama import fused_decoder_for

from ..cpp_ops import needs_cpp_ops
from .fused_models import BASE, PAGE_SIZE, VOCAB, fuse, make

pytestmark = needs_cpp_ops


def lora(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), model)


def hook(model: nn.Module) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: None)


def own_forward(model: nn.Module) -> None:
    model.model.norm.forward = lambda x: x


def training(model: nn.Module) -> None:
    model.model.layers[2].self_attn.train()


def replaced_module(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj = nn.Sequential(nn.Linear(80, 48))


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def half(model: nn.Module) -> None:
    model.lm_head.half()


def one_bfloat16(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.bfloat16()


def removed_layer(model: nn.Module) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 2


def changed_scale(model: nn.Module) -> None:
    model.model.layers[0].self_attn.scaling = 0.5


def changed_rope(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def new_layer_order(model: nn.Module) -> None:
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[1], layers[0], layers[2]])


REFUSED = [lora, hook, pre_hook, own_forward, training, replaced_module, parametrized, half, one_bfloat16]
REASONS = {
    lora: "q_proj is a", hook: "hook", pre_hook: "hook", own_forward: "forward of its own", training: "training mode",
    replaced_module: "down_proj is a Sequential", parametrized: "up_proj is a", half: "float16", one_bfloat16: "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_refused_from_the_start(change: Any) -> None:
    model = make()
    change(model)
    fused, reason = fused_decoder_for(model, page_size=PAGE_SIZE, max_positions=64)
    assert fused is None
    assert REASONS[change] in reason


@pytest.mark.parametrize(
    "change",
    [*REFUSED[:-1], removed_layer, changed_scale, changed_rope, new_layer_order],
    ids=lambda f: f.__name__,
)
def test_noticed_later(change: Any) -> None:
    model = make()
    fused = fuse(model)
    assert fused.still_valid(model)
    change(model)
    assert not fused.still_valid(model)
    assert fused.refresh() != ""


def test_a_changed_dtype_is_noticed_by_refresh() -> None:
    model = make()
    fused = fuse(model)
    one_bfloat16(model)
    assert "bfloat16" in fused.refresh()


def test_global_hooks_and_autocast_are_noticed() -> None:
    model = make()
    fused = fuse(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert not fused.still_valid(model)
    assert "global" in fused_decoder_for(model, page_size=4, max_positions=8)[1]
    handle.remove()
    assert fused.still_valid(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.still_valid(model)
    assert not fused.still_valid(make())


def test_a_replaced_class_forward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    fused = fuse(model)
    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    assert not fused.still_valid(model)
    assert "forward of LlamaRMSNorm" in fused_decoder_for(model, page_size=4, max_positions=8)[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu"}, "act_fn is a"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type dynamic"),
    ],
)
def test_refused_configurations(overrides: dict[str, Any], message: str) -> None:
    fused, reason = fused_decoder_for(make(**overrides), page_size=4, max_positions=8)
    assert fused is None
    assert message in reason


def test_other_families_are_refused() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB)
    fused, reason = fused_decoder_for(transformers.GPT2LMHeadModel(config).eval(), page_size=4, max_positions=8)
    assert fused is None
    assert "GPT2LMHeadModel" in reason


def test_a_subclass_is_refused() -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    model = Mine(transformers.LlamaConfig(**BASE)).eval()
    assert fused_decoder_for(model, page_size=4, max_positions=8)[0] is None
