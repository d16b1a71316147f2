"""Which HF models are plain dense Llama-like decoders, and whether one still is what it was.

Owns the table of admitted families (each modeling file was read against Llama's) and the checks on a live module tree:
exact classes, untouched forwards, no hooks, plain dense parameters. Knows neither packed weights nor batches.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN

CPU_DTYPES = (torch.float32, torch.bfloat16)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # tables that depend on the position alone


@dataclass(frozen=True)
class Family:
    """One modeling file whose layers compute what Llama's do.

    `window` says where its masks take the sliding window from: "none", "config" (all layers) or "layer_types".
    """

    module: str
    prefix: str
    window: str = "none"
    qk_norm: bool = False
    nope: bool = False  # attention.use_rope is set by layer
    multipliers: bool = False  # Granite's constants


FAMILIES = {
    (family.module, f"{family.prefix}ForCausalLM"): family
    for family in (
        Family("transformers.models.llama.modeling_llama", "Llama"),
        Family("transformers.models.mistral.modeling_mistral", "Mistral", window="config"),
        Family("transformers.models.ministral.modeling_ministral", "Ministral", window="layer_types"),
        Family("transformers.models.qwen2.modeling_qwen2", "Qwen2", window="layer_types"),
        Family("transformers.models.qwen3.modeling_qwen3", "Qwen3", window="layer_types", qk_norm=True),
        Family("transformers.models.smollm3.modeling_smollm3", "SmolLM3", window="layer_types", nope=True),
        Family("transformers.models.cwm.modeling_cwm", "Cwm", window="layer_types"),
        Family("transformers.models.seed_oss.modeling_seed_oss", "SeedOss"),
        Family("transformers.models.granite.modeling_granite", "Granite", multipliers=True),
    )
}

_ATTENTION = {"q_proj": nn.Linear, "k_proj": nn.Linear, "v_proj": nn.Linear, "o_proj": nn.Linear}
_MLP = {"gate_proj": nn.Linear, "up_proj": nn.Linear, "down_proj": nn.Linear, "act_fn": type(ACT2FN["silu"])}


def why_not_plain(
    model: nn.Module, *, device: torch.device | str = "cpu", dtypes: Collection[torch.dtype] = CPU_DTYPES
) -> str:
    """ "" when the model is a plain dense Llama-like decoder of one of `dtypes` on `device`, else the reason in words."""
    family = FAMILIES.get((type(model).__module__, type(model).__qualname__))
    if family is None:
        return f"{type(model).__name__} is not one of the plain Llama-like families"
    return (
        _why_not_tree(model, family)
        or _why_not_weights(model, torch.device(device), dtypes)
        or _why_not_constants(model, family)
        or why_touched(model.modules())
    )


def family_of(model: nn.Module) -> Family:
    """The family of a model that `why_not_plain` admitted."""
    return FAMILIES[type(model).__module__, type(model).__qualname__]


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers that the model's forward runs."""
    return list(model.model.layers)[: model.config.num_hidden_layers]


def layer_windows(model: nn.Module, family: Family) -> list[int]:
    """Each layer's sliding window as the family's masks have it; 0 for full attention."""
    config, count = model.config, len(decoder_layers(model))
    if family.window == "none":
        return [0] * count
    window = getattr(config, "sliding_window", None) or 0
    if family.window == "config":
        return [window] * count
    return [window if kind == "sliding_attention" else 0 for kind in config.layer_types[:count]]


def constants(model: nn.Module) -> tuple[Any, ...]:
    """Every number of the config and modules that the fused step bakes in, so that a change can be seen."""
    family, config = family_of(model), model.config
    norms = ("q_norm", "k_norm") if family.qk_norm else ()
    layers = []
    for layer in decoder_layers(model):
        parts = layer._modules
        attention = parts["self_attn"]
        layers.append((
            attention.scaling,
            attention.head_dim,
            attention.use_rope if family.nope else True,
            layer.residual_multiplier if family.multipliers else 1.0,
            parts["input_layernorm"].variance_epsilon,
            parts["post_attention_layernorm"].variance_epsilon,
            *(attention._modules[name].variance_epsilon for name in norms),
        ))  # fmt: skip
    rope = model.model.rotary_emb
    scales = (model.model.embedding_multiplier, config.logits_scaling) if family.multipliers else (1.0, 1.0)
    return (
        tuple(layers), tuple(layer_windows(model, family)), _linear_shapes(model), scales, model.model.norm.variance_epsilon,
        rope.rope_type, rope.attention_scaling, id(rope.inv_freq), rope.inv_freq._version,
    )  # fmt: skip


def _linear_shapes(model: nn.Module) -> tuple[Any, ...]:
    """Shape of each linear, and whether it has a bias."""
    linears = (module for module in model.modules() if type(module) is nn.Linear)
    return tuple((linear.weight.shape, linear.bias is not None) for linear in linears)


def why_touched(modules: Iterator[nn.Module]) -> str:
    """ "" when no module would do more, at inference, than its class's own forward; else the reason."""
    if torch_module._has_any_global_hook():
        return "a global module hook is registered"
    for module in modules:
        state = module.__dict__
        if state["training"]:
            return "the model is in training mode"
        hooks = (*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values())
        if state["_backward_hooks"] or state["_backward_pre_hooks"] or (hooks and any(map(is_user_hook, hooks))):
            return f"a hook is registered on a {type(module).__name__}"
        if "forward" in state:
            return f"a {type(module).__name__} has a forward of its own"
        if state.get("_compiled_call_impl") is not None:
            return f"a {type(module).__name__} is compiled"
    return ""


def _walk(model: nn.Module) -> list[nn.Module]:
    """Every module of the tree, in a fixed order (`modules()` without its bookkeeping: this runs at every call)."""
    found = [model]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def is_user_hook(hook: object) -> bool:
    """Whether a forward hook is more than the recorder of hidden states that transformers leaves, asleep, after one use."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


class Snapshot:
    """The module tree as it was, held weakly; `why_changed` compares the live tree with it in one walk."""

    def __init__(self, model: nn.Module) -> None:
        modules = _walk(model)
        self._dtype, self._device_type = _kind(model)
        self._modules = [(weakref.ref(module), type(module)) for module in modules]
        self._forwards = {kind: kind.forward for _, kind in self._modules}
        self._constants = constants(model)

    def why_changed(self, model: nn.Module) -> str:
        """ "" when the tree has the same modules, classes, forwards and constants, nothing was hung on them, and no autocast is on."""
        if torch.is_autocast_enabled(self._device_type):
            return "autocast is on"
        modules = _walk(model)
        if len(modules) != len(self._modules):
            return "a module was added or removed"
        for module, (ref, kind) in zip(modules, self._modules, strict=True):
            if ref() is not module or type(module) is not kind:
                return f"a {kind.__name__} was replaced"
        if _kind(model) != (self._dtype, self._device_type):
            return "the model's dtype or device changed"
        if any(kind.forward is not forward for kind, forward in self._forwards.items()):
            return "a class's forward was replaced"
        reason = why_touched(iter(modules))
        if not reason and self._constants != constants(model):
            return "a constant of the model changed"
        return reason


def _kind(model: nn.Module) -> tuple[torch.dtype, str]:
    weight = model.lm_head.weight
    return weight.dtype, weight.device.type


def _why_not_tree(model: nn.Module, family: Family) -> str:
    def kind(suffix: str) -> type:
        return getattr(sys.modules[family.module], family.prefix + suffix)

    norms = {"q_norm": kind("RMSNorm"), "k_norm": kind("RMSNorm")} if family.qk_norm else {}
    layer = {
        "self_attn": kind("Attention"), "mlp": kind("MLP"),
        "input_layernorm": kind("RMSNorm"), "post_attention_layernorm": kind("RMSNorm"),
    }  # fmt: skip
    body = {
        "embed_tokens": nn.Embedding, "layers": nn.ModuleList, "norm": kind("RMSNorm"), "rotary_emb": kind("RotaryEmbedding"),
    }  # fmt: skip
    if reason := _why_not_children(model, {"model": kind("Model"), "lm_head": nn.Linear}):
        return reason
    if reason := _why_not_children(model.model, body):
        return reason
    for block in model.model.layers:
        if type(block) is not kind("DecoderLayer"):
            return f"a layer is a {type(block).__name__}"
        reason = _why_not_children(block, layer) or _why_not_children(block.self_attn, _ATTENTION | norms)
        if reason := reason or _why_not_children(block.mlp, _MLP):
            return reason
    for function in ("rotate_half", "apply_rotary_pos_emb"):
        if getattr(sys.modules[family.module], function).__module__ != family.module:
            return f"{function} of {family.module} was replaced"
    return _why_not_forwards({type(module) for module in model.modules()})


def _why_not_children(module: nn.Module, expected: dict[str, type]) -> str:
    if module._modules.keys() != expected.keys():
        return f"{type(module).__name__} has submodules {sorted(module._modules)}, expected {sorted(expected)}"
    for name, kind in expected.items():
        if type(module._modules[name]) is not kind:
            return f"{name} is a {type(module._modules[name]).__name__}, not a {kind.__name__}"
    return ""


def _why_not_forwards(kinds: set[type]) -> str:
    for kind in kinds - {nn.ModuleList}:
        forward = kind.forward
        if (forward.__module__, forward.__qualname__) != (kind.__module__, f"{kind.__qualname__}.forward"):
            return f"the forward of {kind.__name__} was replaced"
    return ""


def _why_not_weights(model: nn.Module, device: torch.device, dtypes: Collection[torch.dtype]) -> str:
    dtype = model.lm_head.weight.dtype
    if dtype not in dtypes:
        return f"the weights are {dtype}: {', '.join(map(str, dtypes))} have a fused path"
    for name, weight in model.named_parameters():
        if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
            return f"{name} is not a plain dense parameter"
        if weight.device != device:
            return f"{name} is on {weight.device}"
        if weight.dtype != dtype:
            return f"{name} is {weight.dtype}, lm_head.weight is {dtype}"
    return ""


def _why_not_constants(model: nn.Module, family: Family) -> str:
    config = model.config
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}"
    if model.model.rotary_emb.rope_type not in ROPE_TYPES:
        return f"rope type {model.model.rotary_emb.rope_type} depends on the sequence length"
    if model.model.embed_tokens.max_norm is not None:
        return "the embedding table renormalises itself"
    layers = decoder_layers(model)
    if not layers:
        return "the model has no layers"
    if len({_linear_shapes(layer) for layer in layers}) > 1:
        return "the layers' sizes differ"
    if family.multipliers and len({layer.residual_multiplier for layer in layers}) > 1:
        return "the residual multiplier differs by layer"
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    if len({norm.variance_epsilon for norm in norms}) > 1:
        return "the norms' epsilons differ"
    if config.num_attention_heads % config.num_key_value_heads:
        return "the attention heads are not a multiple of the key-value heads"
    return ""
