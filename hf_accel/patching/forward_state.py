"""What a captured forward bakes in, of a module tree: its classes, flags and constants, and the addresses of its tensors.

Owns how a change of them is seen, and what forbids a capture: code of the user's that must run at every step. Does not know
weights' values, which may change in place, nor graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hf_accel.patching.llama_structure import is_user_hook

_PLAIN = frozenset({bool, int, float, str, type(None)})
_TENSORS = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
_CALLED_PLAINLY = frozenset({"forward", "_compiled_call_impl"})
_SWITCHED = "_attn_implementation_internal"  # ours while a step runs, and of no consequence for it


def forward_state(model: nn.Module, configs: Sequence[Any]) -> tuple[list[Any], str]:
    """(what the Python side of the model's forward depends on, to be compared with `==`; why it must not be captured, or "").

    Adapters' state and which tensors are parameters are the business of `WeightTracker`.

    Args:
        model: a module tree, walked once.
        configs: the configurations that it reads.
    """
    state: list[Any] = [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()]
    forwards: dict[type, Any] = {}
    kept = _PLAIN | _TENSORS  # tensors outside of parameters and buffers
    reason = "a global module hook is registered" if torch_module._has_any_global_hook() else ""
    modules, known = [model], {model}
    for module in modules:  # grows as it goes
        fields, kind = module.__dict__, type(module)
        forwards[kind] = kind.forward
        state.append(kind)
        state += [value for value in fields.values() if type(value) in kept]
        if fields["_forward_hooks"] or fields["_forward_pre_hooks"] or not _CALLED_PLAINLY.isdisjoint(fields):
            reason = reason or _why_watched(module)
        for child in fields["_modules"].values():
            if child is not None and child not in known:
                known.add(child)
                modules.append(child)
    state = [(id(value), _address(value)) if type(value) in _TENSORS else value for value in state]
    state.append(forwards)
    for config in configs:
        state += [(k, v if type(v) in _PLAIN else repr(v)) for k, v in vars(config).items() if k != _SWITCHED]
    return state, reason


def _why_watched(module: nn.Module) -> str:
    fields = module.__dict__
    for hooks in (fields["_forward_hooks"], fields["_forward_pre_hooks"]):
        if hooks and any(map(is_user_hook, hooks.values())):
            return f"a hook is registered on a {type(module).__name__}"
    if "forward" in fields:
        return f"a {type(module).__name__} has a forward of its own"
    if fields.get("_compiled_call_impl") is not None:
        return f"a {type(module).__name__} is compiled"
    return ""


class TensorAddresses:
    """Where a model's parameters and buffers were, held weakly: `hold` is cheap enough for every step."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._refs = [weakref.ref(tensor) for tensor in tensors]
        self._addresses = [_address(tensor) for tensor in tensors]

    def hold(self) -> bool:
        """Whether each tensor is there still, and at the same address."""
        try:
            return [ref().data_ptr() for ref in self._refs] == self._addresses  # type: ignore[union-attr]
        except (
            AttributeError,
            RuntimeError,
            NotImplementedError,
            ValueError,
        ):  # one is gone, or has no readable memory
            tensors = [ref() for ref in self._refs]
            return [t is not None and _address(t) for t in tensors] == self._addresses


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # a wrapper of quantized weights, a sparse or fake tensor
        return -1
