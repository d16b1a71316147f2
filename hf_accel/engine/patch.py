"""`patch` and `unpatch`: puts an engine behind a model's own `generate`. Owns the table of patched models."""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from hf_accel.config import EngineConfig
from hf_accel.engine.engine import Engine
from hf_accel.engine.generate import sample
from hf_accel.engine.generate_keywords import with_constraint
from hf_accel.engine.model_runner import kv_storage_dtype
from hf_accel.engine.outlines_door import processor_for
from hf_accel.patching import hooks, outlines_hook
from hf_accel.patching.registry import ModelSpec, base_model, read_spec


@dataclass
class _Patched:
    config: dict[str, Any]
    spec: ModelSpec
    wrapper: weakref.ref[Any]  # what the user patched: the model, or a PEFT model around it
    engine: Engine | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_patched: weakref.WeakKeyDictionary[PreTrainedModel, _Patched] = weakref.WeakKeyDictionary()


def patch(model: Any, **config: Any) -> Any:
    """Accelerate `model.generate` in place; its signature, return types and answers stay as they are.

    `generate` also takes `regex=`, `json_schema=`, `choice=`, `grammar=`, `json_object=True` or `constraint=` with `tokenizer=`, one
    for all prompts or a list with one (or None) for each, and `close_within_budget=True`: see `SamplingParams`. Generators of
    outlines on the model use these masks.
    The model's modules, parameters, `state_dict` and attributes are not touched; on CUDA the q, k and v weights of a plain dense
    Llama-like layer come to lie one after the other in memory, as do its gate and up weights, until `unpatch` or `sleep`. KV
    memory is taken at the first call.
    Patching again with other options replaces them. Undo with `unpatch`, or use it as `with hf_accel.patch(model): ...`.

    Args:
        model: a loaded transformers causal language model, or a PEFT model around one.
        config: fields of `EngineConfig`, such as `num_pages`, `memory_fraction`, `policy`.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the model cannot be accelerated; the message names the reason, and nothing was changed.
        ValueError: an option is unknown or out of range.
    """
    hf_model = base_model(model)
    options = EngineConfig.from_kwargs(**config)
    known = _patched.get(hf_model)
    if known is not None and known.config == config and known.wrapper() is model:
        return model
    spec = read_spec(hf_model)
    kv_storage_dtype(spec, options, hf_model.dtype)  # raises now, not at the first call
    unpatch(model)
    _patched[hf_model] = _Patched(config, spec, weakref.ref(model))
    try:
        hooks.install(hf_model, _run, with_constraint, unpatch, wrapper=model)
        outlines_hook.install(hf_model, functools.partial(processor_for, is_patched))
    except BaseException:
        unpatch(model)
        raise
    return model


def unpatch(model: Any) -> Any:
    """Undo `patch` exactly, and give the KV memory back. A model that is not patched is left alone. Returns the model."""
    hf_model = base_model(model)
    entry = _patched.pop(hf_model, None)
    if entry is not None:
        hooks.uninstall(hf_model)
        outlines_hook.uninstall(hf_model)
        hooks.uninstall(entry.wrapper())
        if entry.engine is not None:
            entry.engine.shutdown()
    return model


def is_patched(model: Any) -> bool:
    """Whether `patch` is in force on this model."""
    return base_model(model) in _patched


def get_engine(model: Any) -> Engine:
    """The engine behind a patched model (made now if no call has needed it yet).

    Raises:
        ValueError: the model is not patched.
    """
    hf_model = base_model(model)
    entry = _patched.get(hf_model)
    if entry is None:
        raise ValueError("the model is not patched: call hf_accel.patch(model) first")
    with entry.lock:
        if entry.engine is None:
            entry.engine = Engine(hf_model, keep_model=False, spec=entry.spec, **entry.config)
        return entry.engine


def _run(model: PreTrainedModel, original: functools.partial[Any], *args: Any, **kwargs: Any) -> Any:
    return sample(get_engine(model), model, original, *args, **kwargs)
