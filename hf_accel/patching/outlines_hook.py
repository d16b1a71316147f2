"""The seam in outlines: where its generators make the logits processor of an output type.

Set when outlines is imported, before a model is patched or after; undone with the last patched model. Knows nothing of engines or
constraints: what makes a processor instead is handed in.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger("hf_accel")

MakeProcessor = Callable[[Any, Any], Any]
"""`make(outlines_model, output_type)`: a processor in place of outlines' own, or None to leave it to outlines."""

_MODULE, _CLASS = "outlines.generator", "SteerableGenerator"
_BACKENDS = (None, "outlines_core", "llguidance", "xgrammar")

_lock = threading.RLock()  # a weakref callback may fire while it is held
_models: dict[int, weakref.ref[Any]] = {}
_wrapped: list[tuple[type, Callable[..., None], Callable[..., None]]] = []  # class, its own __init__, ours


def install(model: Any, make: MakeProcessor) -> None:
    """From now on, while `model` lives and until `uninstall`, generators of outlines ask `make` first."""
    with _lock:
        _models[id(model)] = weakref.ref(model, functools.partial(_gone, id(model)))
        if _wrapped or any(isinstance(f, _Awaiter) for f in sys.meta_path):
            return
        module = sys.modules.get(_MODULE)
        if module is not None:
            _wrap(module, make)
        else:
            sys.meta_path.insert(0, _Awaiter(make))


def uninstall(model: Any) -> None:
    """Undo `install`; outlines is left as it was found once the last model is gone. Unknown models are ignored."""
    _forget(id(model))


def _gone(key: int, _: object) -> None:
    if not sys.is_finalizing():
        _forget(key)


def _forget(key: int) -> None:
    with _lock:
        if _models.pop(key, None) is None or _models:
            return
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Awaiter)]
        for cls, original, ours in _wrapped:
            if cls.__dict__.get("__init__") is ours:
                cls.__init__ = original  # type: ignore[misc]
        _wrapped.clear()


def _wrap(module: types.ModuleType, make: MakeProcessor) -> None:
    cls = getattr(module, _CLASS, None)
    original = getattr(cls, "__init__", None)
    if not isinstance(cls, type) or not isinstance(original, types.FunctionType):
        logger.warning("hf_accel: this version of outlines has no %s: its processors run as they are", _CLASS)
        return

    @functools.wraps(original)
    def __init__(self: Any, model: Any, output_type: Any = None, backend_name: Any = None, **options: Any) -> None:
        known = backend_name in _BACKENDS and not options and output_type is not None and bool(_models)
        processor = make(model, output_type) if known else None
        if processor is None:
            original(self, model, output_type, backend_name, **options)
        else:
            self.model, self.logits_processor = model, processor

    cls.__init__ = __init__  # type: ignore[misc]
    _wrapped.append((cls, original, __init__))


class _Awaiter(importlib.abc.MetaPathFinder):
    """Waits for the import of outlines' generators."""

    def __init__(self, make: MakeProcessor) -> None:
        self._make = make

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self._loaded)
        return spec

    def _loaded(self, module: types.ModuleType) -> None:
        with _lock:
            if self in sys.meta_path:  # else the last model is gone meanwhile
                sys.meta_path.remove(self)
                _wrap(module, self._make)


class _Loader(importlib.abc.Loader):
    """Another loader, and a call when the module is there. The module knows the other one only."""

    def __init__(self, loader: Any, loaded: Callable[[types.ModuleType], None]) -> None:
        self._loader, self._then = loader, loaded

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        module: types.ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then(module)
