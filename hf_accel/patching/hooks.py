"""The generate seams: `_sample` of a model's class, where greedy search and sampling both arrive with everything prepared, and
`generate`, whose keywords may be ours.

Installed once per class, opted into per instance, removed with the last instance. Beam search, assisted decoding and the
rest never reach `_sample`. Knows nothing of engines: what runs instead is handed in.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

SampleFunction = Callable[..., Any]
"""`run(model, original, *args, **kwargs)`: the replacement; `original(*args, **kwargs)` is HF's bound `_sample`."""

KeywordFunction = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""`translate(model, keywords)`: the keywords that HF's `generate` shall have."""

_lock = threading.RLock()  # a weakref callback may fire while it is held
_Entry = tuple[weakref.ref[Any], SampleFunction, KeywordFunction]
_instances: dict[type, dict[int, _Entry]] = {}
_MISSING = object()
_displaced: dict[type, dict[str, Any]] = {}


def install(
    model: PreTrainedModel,
    run: SampleFunction,
    translate: KeywordFunction,
    leave: Callable[[Any], Any],
    wrapper: object | None = None,
) -> None:
    """Send this model's `_sample` calls to `run`, and `generate`'s keywords through `translate`. Other models of its class are
    not touched.

    While its class has a patched model, a `with` block over one calls `leave(model)` at its end; so for the `wrapper`
    (a PEFT model), if the user patched that.
    """
    context = {"__enter__": lambda self: self, "__exit__": lambda self, *exc: leave(self) and None}
    with _lock:
        entry = (run, translate)
        _add(model, entry, lambda cls, entries: {**_seams(cls, entries), **context})
        if wrapper is not None and wrapper is not model:
            _add(wrapper, entry, lambda cls, entries: context)


def uninstall(model: object) -> None:
    """Undo `install` for a model or a wrapper; its class is left as it was found once the last one is gone.

    Unknown models are ignored.
    """
    _remove(type(model), id(model))


def _add(
    owner: Any,
    functions: tuple[SampleFunction, KeywordFunction],
    make_attributes: Callable[[Any, dict[int, _Entry]], dict[str, Callable[..., Any]]],
) -> None:
    cls = type(owner)
    if cls not in _instances:
        entries: dict[int, _Entry] = {}
        attributes = make_attributes(cls, entries)
        _instances[cls] = entries
        _displaced[cls] = {name: cls.__dict__.get(name, _MISSING) for name in attributes}
        for name, value in attributes.items():
            setattr(cls, name, value)
    _instances[cls][id(owner)] = (weakref.ref(owner, _remover(cls, id(owner))), *functions)


def _remover(cls: type, key: int) -> Callable[[object], None]:
    return lambda _: _remove(cls, key)


def _remove(cls: type, key: int) -> None:
    with _lock:
        entries = _instances.get(cls)
        if entries is None or entries.pop(key, None) is None or entries:
            return
        del _instances[cls]
        for name, old in _displaced.pop(cls).items():
            if old is _MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, old)


def _seams(cls: Any, entries: dict[int, _Entry]) -> dict[str, Callable[..., Any]]:
    return {"_sample": _dispatching(cls._sample, entries), "generate": _translating(cls.generate, entries)}


def _translating(original: Callable[..., Any], entries: dict[int, _Entry]) -> Callable[..., Any]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(original).parameters.values() if p.kind in kinds][1:]

    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        entry = entries.get(id(self))
        if entry is not None and entry[0]() is self:
            by_position = dict(zip(names, args, strict=False))
            if len(args) == len(by_position) and not by_position.keys() & kwargs.keys():
                args, kwargs = (), {**by_position, **kwargs}
            kwargs = entry[2](self, kwargs)
        return original(self, *args, **kwargs)

    return generate


def _dispatching(original: Callable[..., Any], entries: dict[int, _Entry]) -> Callable[..., Any]:
    @functools.wraps(original)  # HF inspects the signature
    def _sample(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        entry = entries.get(id(self))
        bound = functools.partial(original, self)
        if entry is None or entry[0]() is not self:
            return bound(*args, **kwargs)
        return entry[1](self, bound, *args, **kwargs)

    return _sample
