"""Runs somebody's script unchanged, with every causal language model that it loads patched on its way out.

The one thing it replaces is `PreTrainedModel.from_pretrained`, through which the auto classes, the model classes and
`pipeline()` all load; it is put back when the script ends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import runpy
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("hf_accel")

MODELING = "transformers.modeling_utils"
OnLoad = Callable[[Any], None]


def run(
    target: str,
    args: Sequence[str],
    *,
    as_module: bool = False,
    engine_config: Mapping[str, Any] | None = None,
    show_stats: bool = False,
) -> int:
    """Run a script, or a module as `python -m` does, as `__main__` with accelerated models.

    Args:
        target: path of a script (or of a folder or zip file with a `__main__.py`), or a module's name.
        args: what the script finds in `sys.argv[1:]`.
        engine_config: fields of `EngineConfig`, for every model.
        show_stats: print what the engines did, to stderr, when the script ends (keeps the models in memory until then).

    Returns:
        The exit code: 0, or 1 after an exception, whose traceback is printed as Python prints it.

    Raises:
        SystemExit: the script's own.
        FileNotFoundError: there is no such script.
    """
    if not as_module and not Path(target).exists():
        raise FileNotFoundError(f"no such script: {target}")
    models: list[Any] = []

    def on_load(model: Any) -> None:
        if accelerate(model, engine_config or {}) and show_stats:
            models.append(model)

    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [target, *args]
    try:
        with patched_loading(on_load):
            if as_module:
                _set_first_path(os.getcwd())
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            elif Path(target).is_dir():
                runpy.run_path(target, run_name="__main__")
            else:
                _set_first_path(str(Path(target).resolve().parent))
                runpy.run_path(target, run_name="__main__")
        return 0
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _without_our_frames(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.argv, sys.path[:] = saved_argv, saved_path
        for index, model in enumerate(models):
            _print_stats(index, model)


def accelerate(model: Any, engine_config: Mapping[str, Any]) -> bool:
    """Patch a model that was just loaded; one that cannot be patched is left alone, with a log line if it generates text."""
    import hf_accel

    if not model.can_generate() or hf_accel.is_patched(model):
        return False
    name = type(model).__name__
    try:
        hf_accel.patch(model, **engine_config)
    except hf_accel.UnsupportedModelError as error:
        logger.warning("hf-accel: %s runs unaccelerated: %s", name, error)
        return False
    logger.info("hf-accel: %s is accelerated", name)
    return True


@contextlib.contextmanager
def patched_loading(on_load: OnLoad) -> Iterator[None]:
    """Within the block, `on_load(model)` is called with each model that `from_pretrained` of any model class returns.

    transformers itself is imported by the script alone, after whatever the script does first (its environment variables are
    read at import): until then an import hook waits for it.
    """
    undo: list[Callable[[], None]] = []

    def wrap(modeling_utils: Any) -> None:
        base = modeling_utils.PreTrainedModel
        original = base.__dict__["from_pretrained"]

        @functools.wraps(original.__func__)
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            loaded = original.__func__(cls, *args, **kwargs)
            on_load(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple with output_loading_info=True
            return loaded

        base.from_pretrained = classmethod(from_pretrained)
        undo.append(lambda: setattr(base, "from_pretrained", original))

    hook = _ImportHook(MODELING, wrap)
    if MODELING in sys.modules:
        wrap(sys.modules[MODELING])
    else:
        sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        if hook in sys.meta_path:
            sys.meta_path.remove(hook)
        for action in undo:
            action()


class _ImportHook(importlib.abc.MetaPathFinder):
    """Calls `after(module)` once `name` has been imported by whoever needs it."""

    def __init__(self, name: str, after: Callable[[Any], None]) -> None:
        self._name, self._after = name, after

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, its loader told to call back."""
        if fullname != self._name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = self._calling_back(spec.loader.exec_module)  # type: ignore[method-assign]
                return spec
        return None

    def _calling_back(self, execute: Callable[[types.ModuleType], None]) -> Callable[[types.ModuleType], None]:
        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self._after(module)

        return exec_module


def _set_first_path(entry: str) -> None:
    """As Python does for a script: its folder stands where the launcher's own stood."""
    if not sys.flags.safe_path:
        sys.path[:1] = [entry]


def _without_our_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback from the script's first frame on; None if the script never began (a syntax error, no such module)."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    first = trace
    while first is not None and first.tb_frame.f_code.co_filename in ours:
        first = first.tb_next
    return first


def _print_stats(index: int, model: Any) -> None:
    import hf_accel

    if not hf_accel.is_patched(model):
        return
    stats = hf_accel.get_engine(model).stats().to_dict()
    print(f"hf-accel: model {index} ({type(model).__name__})", file=sys.stderr)
    for name, value in stats.items():
        print(f"  {name:<22} {value:.3g}" if isinstance(value, float) else f"  {name:<22} {value}", file=sys.stderr)
