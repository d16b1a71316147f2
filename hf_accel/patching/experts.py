"""The experts seam: functions registered with transformers' ExpertsInterface, and the switch that turns them on.

Owns the registry entries and, while a step runs, the model's `_experts_implementation`. Between steps the configuration is
the user's own. Knows how transformers' experts modules look, and no model family; which of them compute as we do is decided
call by call, and every other one runs as its configuration named.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, _default_apply_gate

from hf_accel.patching.config_switch import ConfigSwitch
from hf_accel.patching.stepping import in_step, step
from hf_accel_kernels.moe import moe_experts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_names: dict[str | None, str] = {}
_switch = ConfigSwitch("_experts_implementation_internal")


def _registered_name(original: str | None) -> str:
    """The interface entry that stands in for `original`: ours for plain experts, `original` for the rest."""
    if original not in _names:
        name = f"hf_accel_experts_{len(_names)}"
        ExpertsInterface.register(name, _make_experts(original))
        _names[original] = name
    return _names[original]


def _make_experts(original: str | None) -> Callable[..., torch.Tensor]:
    def hf_accel_experts(module: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        activation = _plain_activation(module) if in_step() and len(args) == 3 and not kwargs else None
        if activation is not None and _takes(module, *args):
            hidden, ids, weights = args
            gate_up, down = module._parameters["gate_up_proj"], module._parameters["down_proj"]
            return moe_experts(hidden, ids, weights, gate_up, down, activation=activation)
        _, default = _dispatch(type(module))
        return ALL_EXPERTS_FUNCTIONS.get_interface(original, default)(module, *args, **kwargs)

    return hf_accel_experts


def experts_configs(model: nn.Module) -> list[Any]:
    """The distinct configuration objects that the model's plain experts read their implementation from.

    A config that experts of another interface (float8) read as well is left out: they would not know our name.
    """
    found, foreign = {}, set()
    for module in model.modules():
        config = getattr(module, "config", None)
        interface, _ = _dispatch(type(module))
        if interface is None or not hasattr(config, "_experts_implementation_internal"):
            continue
        if interface is not ALL_EXPERTS_FUNCTIONS:
            foreign.add(id(config))
        elif _plain_activation(module) is not None:
            found[id(config)] = config
    return [config for key, config in found.items() if key not in foreign]


@contextlib.contextmanager
def experts_on(configs: list[Any]) -> Iterator[None]:
    """While open, and in this thread, models that read `configs` run their plain experts through us."""
    with _switch.on(configs, _registered_name), step():
        yield


@functools.cache
def _dispatch(cls: type) -> tuple[Any, Callable[..., torch.Tensor] | None]:
    """The interface that a class of experts asks for its implementation, and its own forward; None, None for others."""
    for base in cls.__mro__:
        forward = base.__dict__.get("forward")
        if inspect.isfunction(forward) and "experts_interface" in forward.__code__.co_freevars:
            names = inspect.getclosurevars(forward).nonlocals
            return names["experts_interface"], names["original_forward"]
    return None, None


def _plain_activation(module: nn.Module) -> str | None:
    """The gate's activation if the experts are down(act(gate x) * up x) of whole local weights, else None."""
    plain = (
        getattr(module, "has_gate", False)
        and module.is_concatenated
        and not module.is_transposed
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
        and type(module)._apply_gate is _default_apply_gate
        and "_apply_gate" not in module.__dict__
    )
    return _activation_name(getattr(module, "act_fn", None)) if plain else None


def _activation_name(act: Any) -> str | None:
    if "forward" in getattr(act, "__dict__", ()):
        return None
    kind, inner = type(act), getattr(act, "act", None)
    if kind in (SiLUActivation, nn.SiLU):
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is GELUActivation and inner is F.gelu:
        return "gelu"
    if kind is GELUTanh and isinstance(inner, functools.partial):
        return "gelu_tanh"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
    return None


def _takes(module: nn.Module, hidden: Any, ids: Any, weights: Any) -> bool:
    """Whether these arguments and the module's weights are what `moe_experts` computes as the tensor operations would."""
    gate_up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if type(gate_up) is not nn.Parameter or type(down) is not nn.Parameter:
        return False
    if not all(type(t) is torch.Tensor for t in (hidden, ids, weights)):
        return False
    tensors = (hidden, weights, gate_up, down)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return (
        all(t.device.type == "cpu" and t.layout is torch.strided for t in (*tensors, ids))
        and hidden.dtype == gate_up.dtype == down.dtype
        and hidden.dtype in _DTYPES
        and weights.is_floating_point()
        and ids.dtype == torch.int64
        and hidden.dim() == ids.dim() == 2
        and ids.shape == weights.shape
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and down.shape[0] == getattr(module, "num_experts", None)
        and gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
        and hidden.shape[1] == down.shape[1]
        and hidden.shape[0] == ids.shape[0]
    )
