"""Fast CPU linears for models that run their own layers: plain dense `nn.Linear`s answer from a packed copy during a step.

Owns the packed copies and, while a step runs, the instance-level `forward` of those modules. Between steps, in other
threads and under autograd each module is what it was. Does not know when weights change (the engine calls `refresh`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from hf_accel.patching.stepping import in_step, step
from hf_accel_kernels.cpu import library
from hf_accel_kernels.packed import PackedLinear, packed_linear

SMALLEST_SIDE = 64
"""A linear with fewer rows or columns (an adapter's, a router's) is left as it is."""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is exactly an `nn.Linear` over a dense float32 or bfloat16 CPU parameter, called as its class does."""
    if type(module) is not nn.Linear or "forward" in module.__dict__ or "parametrizations" in module._modules:
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and weight.dtype in (torch.float32, torch.bfloat16)
        and min(weight.shape) >= SMALLEST_SIDE
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype == weight.dtype))
    )


class PackedLinears:
    """The packed copies of one model's plain linears.

    Args:
        model: whose linears; held weakly, and never changed outside a step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packed: list[tuple[weakref.ref[nn.Module], PackedLinear, Callable[[torch.Tensor], torch.Tensor]]] = []
        for module in model.modules():
            if is_plain_linear(module):
                assert isinstance(module, nn.Linear)
                packed = PackedLinear([module.weight], [module.bias])
                ref = weakref.ref(module)  # a hook on it may lead back to the model
                self._packed.append((ref, packed, _make_forward(ref, packed)))

    @staticmethod
    def why_not() -> str:
        """ "" where packed linears work on this machine, else the reason."""
        return "" if library.load()[0] is not None else library.load()[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed copies."""
        return sum(packed.num_bytes for _, packed, _ in self._packed)

    def refresh(self, model: nn.Module) -> bool:
        """Pack again after a weight change; False if the model's linears are no longer the ones packed (make anew)."""
        modules = [m for m in model.modules() if is_plain_linear(m)]
        if len(modules) != len(self._packed):
            return False
        for module, (ref, packed, _) in zip(modules, self._packed, strict=True):
            shape = (packed.num_columns, packed.depth)
            if module is not ref() or tuple(module.weight.shape) != shape or module.weight.dtype != packed.dtype:
                return False
            if packed.with_bias != (module.bias is not None):
                return False
            packed.repack(0, module.weight, module.bias)
        return True

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """While open, and in this thread, the linears run packed. One that got a `forward` of its own is left alone."""
        linears = [(ref(), forward) for ref, _, forward in self._packed]
        taken = [(m, forward) for m, forward in linears if type(m) is nn.Linear and "forward" not in m.__dict__]
        for module, forward in taken:
            module.__dict__["forward"] = forward
        try:
            with step():
                yield
        finally:
            for module, forward in taken:
                if module.__dict__.get("forward") is forward:
                    del module.__dict__["forward"]


def _make_forward(ref: weakref.ref[nn.Module], packed: PackedLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    rows, depth = packed.num_columns, packed.depth

    def forward(input: torch.Tensor) -> torch.Tensor:
        runs_packed = in_step() and not torch.is_grad_enabled()
        if not runs_packed or input.dtype != packed.dtype or input.device.type != "cpu" or not input.numel():
            module = ref()
            assert isinstance(module, nn.Linear), "a module runs its forward, so it is there"
            return F.linear(input, module.weight, module.bias)
        return packed_linear(input.reshape(-1, depth), packed).view(*input.shape[:-1], rows)

    return forward
