"""Which weights made a KV page: a version that changes when a module's weights or adapters may have changed.

Owns the signals (see `WeightTracker`) and the one process-wide optimizer hook. Does not know what the version is used
for, nor PEFT: adapter layers are recognised by their attributes.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Hashable, Iterable
from operator import call, is_
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_accel_kernels.fingerprint import SampledFingerprint

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
_PLAIN_DATA = (str, float, int, bool, type(None))
_MAX_ADAPTER_STATES = 4096


class WeightTracker:
    """Watches one module, and tells by a small hashable value whether its outputs may have changed.

    Compared at every call, against the call before:

    * the modules, parameters and buffers of the tree, by identity (`load_state_dict(assign=True)`, added adapters,
      replaced layers), and address, dtype, device, shape and strides of each tensor (`.to`, `.data = ...`);
    * their `_version` counters (every in-place write that autograd can see: for-loop and foreach optimizers,
      `load_state_dict`, `no_grad` writes);
    * steps of any `torch.optim.Optimizer` that holds one of the parameters, or a view of their storage: fused and custom
      optimizers do not move the counters;
    * a fingerprint of a strided sample of every tensor, which catches writes through `.data` and `inference_mode`;
    * the merged adapters, and for `version()` also the active ones, their scaling, and whether they are disabled.

    It cannot see: a write through `.data` (or to an inference tensor) that misses every sampled element, such as a single
    element or row; tensors and numbers kept outside `parameters()` and `buffers()`; a replaced `forward`. After those,
    call `invalidate()`.

    It refers to the module weakly and to no tensor at all. Calls are safe from several threads, but the value says
    nothing about a write that runs at the same moment.

    Args:
        model: the module, which its owner keeps alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._weights_version = 0
        self._layout_number = 0
        self._adapter_number = -1
        self._num_steps = 0  # written by the optimizer hook
        self._seen: tuple[Any, ...] = ()
        self._merged: list[Hashable] = []
        self._module_refs: list[weakref.ref[nn.Module]] = []
        self._tensor_refs: list[weakref.ref[torch.Tensor]] = []
        self._adapter_indices: list[int] = []  # which modules of the walk are adapter layers
        self._parameter_ids: frozenset[int] = frozenset()
        self._storages: frozenset[int] = frozenset()
        self._has_subclasses = False
        self._layouts: list[tuple[Any, ...]] = []
        self._plan: SampledFingerprint | None = None
        self._adapter_states: dict[Hashable, int] = {}
        self._adapter_ids = itertools.count()
        self._refresh()
        _watch_optimizers(self)

    def weights_version(self) -> int:
        """A number that changes whenever the weights may have changed, and never comes back to an earlier value.

        Raises:
            RuntimeError: the module is gone.
        """
        with self._lock:
            self._refresh()
            return self._weights_version

    def version(self) -> Hashable:
        """The weights' version together with the adapters' state.

        Switching an adapter off and on again gives the first value back; a write to any weight never does.

        Raises:
            RuntimeError: the module is gone.
        """
        with self._lock:
            modules = self._refresh()
            if not self._adapter_indices:
                self._adapter_number = -1
                return (self._weights_version, -1)
            state = tuple([_adapter_state(modules[i]) for i in self._adapter_indices])
            number = self._adapter_states.get(state)
            if number is None:
                if len(self._adapter_states) >= _MAX_ADAPTER_STATES:
                    self._adapter_states.clear()
                number = self._adapter_states[state] = next(self._adapter_ids)
            self._adapter_number = number
            return (self._weights_version, number)

    @property
    def layout_version(self) -> Hashable:
        """What `version()` last saw of the modules, the tensors' addresses and layouts and the adapters' state, merged ones
        too: it stays as it is where only values were written in place."""
        return (self._layout_number, self._adapter_number)

    def invalidate(self) -> None:
        """Say that the weights have changed in a way that cannot be seen."""
        with self._lock:
            self._weights_version += 1

    def accept_move(self) -> None:
        """Say that what changed since the last call is where tensors lie: their values are what they were."""
        with self._lock:
            version = self._weights_version
            self._refresh()
            self._weights_version = version

    def close(self) -> None:
        """Stop listening to optimizers; the process-wide hook goes with the last tracker, closed or collected."""
        _unwatch_optimizers(self)

    def _refresh(self) -> list[nn.Module]:
        """Compare everything with the last call, count a change; returns the modules of the tree."""
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this weight tracker no longer exists")
        modules, tensors = _walk(model)
        same_objects = _refer_to(self._module_refs, modules) and _refer_to(self._tensor_refs, tensors)
        if not same_objects:
            self._remember_objects(modules, tensors)
        leaves = list(itertools.chain.from_iterable(map(_leaves, tensors))) if self._has_subclasses else tensors
        versions, layouts = _versions(leaves), _layouts(leaves)
        same_layouts = layouts == self._layouts and self._plan is not None
        if not same_layouts:
            self._remember_layouts(leaves, layouts)
        assert self._plan is not None
        fingerprint = self._plan.compute([leaves[i] for i in self._sampled])
        merged = [_freeze(modules[i].__dict__.get("merged_adapters")) for i in self._adapter_indices]
        seen = (self._num_steps, fingerprint, versions, self._layouts, merged)
        if not same_objects or not same_layouts or merged != self._merged:
            self._layout_number += 1
            self._merged = merged
        if seen != self._seen or not same_objects:
            self._weights_version += 1
            self._seen = seen
        return modules

    def _remember_objects(self, modules: list[nn.Module], tensors: list[torch.Tensor]) -> None:
        self._module_refs = [weakref.ref(module) for module in modules]
        self._tensor_refs = [weakref.ref(tensor) for tensor in tensors]
        self._parameter_ids = frozenset(map(id, tensors))
        self._has_subclasses = any(type(tensor) not in _PLAIN_TENSORS for tensor in tensors)
        self._adapter_indices = [i for i, module in enumerate(modules) if _is_adapter_layer(module)]

    def _remember_layouts(self, leaves: list[torch.Tensor], layouts: list[tuple[Any, ...]]) -> None:
        self._layouts = layouts
        self._sampled = [i for i, layout in enumerate(layouts) if layout[0]]
        self._plan = SampledFingerprint([leaves[i] for i in self._sampled])
        self._storages = frozenset(leaves[i].untyped_storage().data_ptr() for i in self._sampled)

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(p) in self._parameter_ids for p in parameters) or any(
            address in self._storages for p in parameters for address in _storage_addresses(p)
        ):
            with _HOOK_LOCK:
                self._num_steps += 1


# -- the module tree --


def _walk(root: nn.Module) -> tuple[list[nn.Module], list[torch.Tensor]]:
    """All modules once, breadth first, and the parameters and buffers of each. `Module.modules()` takes ten times as long."""
    modules, known, tensors = [root], {root}, []
    for module in modules:  # grows as it goes
        fields = module.__dict__
        children = fields["_modules"]
        if children:
            for child in children.values():
                if child is not None and child not in known:
                    known.add(child)
                    modules.append(child)
        if fields["_parameters"]:
            tensors += fields["_parameters"].values()
        if fields["_buffers"]:
            tensors += _own_buffers(fields)
    return modules, [tensor for tensor in tensors if tensor is not None]


def _own_buffers(fields: dict[str, Any]) -> list[torch.Tensor | None]:
    """A module's buffers, but for the frequencies that longrope and dynamic rope derive anew in every forward."""
    buffers = fields["_buffers"]
    if not any(name in str(fields.get("rope_type")) for name in ("longrope", "dynamic")):
        return list(buffers.values())
    return [buffer for name, buffer in buffers.items() if "original" in name or not name.endswith("inv_freq")]


def _refer_to(refs: list[weakref.ref[Any]], objects: list[Any]) -> bool:
    return len(refs) == len(objects) and all(map(is_, map(call, refs), objects))


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a tensor's memory: itself, or the parts of a wrapper (quantized weights, DTensor)."""
    if type(tensor) in _PLAIN_TENSORS or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(tensor, name))]


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # an inference tensor has no counter
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _layouts(tensors: list[torch.Tensor]) -> list[tuple[Any, ...]]:
    """(address, dtype, device, shape, strides) of each; the address is 0 for a tensor without readable memory."""
    try:
        return [(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in tensors]
    except (RuntimeError, NotImplementedError, ValueError):
        return [_layout(tensor) for tensor in tensors]


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    try:
        return (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, fake, or not yet initialised
        return (0, tensor.dtype, tensor.device)


# -- adapters --


def _is_adapter_layer(module: nn.Module) -> bool:
    """Whether it keeps adapter state: PEFT's layers have these as properties, others may have plain attributes."""
    if "merged_adapters" in module.__dict__:
        return True
    return any(
        name in module.__dict__ or isinstance(getattr(type(module), name, None), property)
        for name in ("active_adapters", "active_adapter", "disable_adapters")
    )


def _adapter_state(module: nn.Module) -> Hashable:
    fields = module.__dict__
    if "_active_adapter" in fields and "_disable_adapters" in fields:  # PEFT's, without the detour over its properties
        active, disabled = fields["_active_adapter"], fields["_disable_adapters"]
    else:
        active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
        disabled = getattr(module, "disable_adapters", None)
    return (_freeze(active), disabled is True, _freeze(fields.get("scaling")), _freeze(fields.get("lora_alpha")))


def _freeze(value: Any) -> Hashable:
    """A hashable copy of plain data; of anything else, only its type."""
    kind = type(value)
    if kind in _PLAIN_DATA:
        return value
    if isinstance(value, dict):
        return tuple([(key, item if type(item) in _PLAIN_DATA else _freeze(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return tuple(map(_freeze, value))
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), tuple(value.detach().reshape(-1).tolist()))
    return kind.__qualname__


# -- optimizers --

_TRACKERS: set[weakref.ref[WeightTracker]] = set()
_HOOK: dict[str, Any] = {}  # the handle of the installed hook
_HOOK_LOCK = threading.RLock()  # a finalizer may call close(), or a weakref's callback come, while this thread holds it


def _watch_optimizers(tracker: WeightTracker) -> None:
    with _HOOK_LOCK:
        _TRACKERS.add(weakref.ref(tracker, _forget_collected))
        if not _HOOK:
            _HOOK["step"] = register_optimizer_step_post_hook(_after_optimizer_step)


def _unwatch_optimizers(tracker: WeightTracker) -> None:
    with _HOOK_LOCK:
        _TRACKERS.discard(weakref.ref(tracker))
        if not _TRACKERS:
            _remove_hook()


def _forget_collected(ref: weakref.ref[WeightTracker]) -> None:
    """A tracker was collected without `close`. That may be while torch walks its hooks, which must then stay as they are.

    Alone, ours can go even then. Beside others it stays, with nothing to do, for the next tracker to find.
    """
    with _HOOK_LOCK:
        _TRACKERS.discard(ref)
        if not _TRACKERS and _HOOK and len(_HOOK["step"].hooks_dict_ref() or ()) == 1:
            _remove_hook()


def _remove_hook() -> None:
    handle = _HOOK.pop("step", None)
    if handle is not None:
        handle.remove()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with _HOOK_LOCK:
        trackers = [ref() for ref in list(_TRACKERS)]
    for tracker in trackers:
        if tracker is not None:
            tracker._on_optimizer_step(optimizer)


def _storage_addresses(tensor: torch.Tensor) -> Iterable[int]:
    return [leaf.untyped_storage().data_ptr() for leaf in _leaves(tensor) if _layout(leaf)[0]]
