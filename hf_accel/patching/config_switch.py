"""Another value for one attribute of a model's configuration while a step runs, and the user's own value between steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class ConfigSwitch:
    """Switches one attribute of configurations; counted, so that models sharing a configuration may overlap.

    Args:
        attribute: of the configurations.
    """

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute
        self._active: dict[int, tuple[int, str | None]] = {}  # id of a config -> (holders, its own value)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def on(self, configs: list[Any], stand_in: Callable[[str | None], str]) -> Iterator[None]:
        """While open, each config has `stand_in(its own value)`."""
        name, active = self._attribute, self._active
        with self._lock:
            for config in configs:
                count, original = active.get(id(config), (0, getattr(config, name)))
                if count == 0:
                    setattr(config, name, stand_in(original))
                active[id(config)] = (count + 1, original)
        try:
            yield
        finally:
            with self._lock:
                for config in configs:
                    count, original = active.pop(id(config))
                    if count > 1:
                        active[id(config)] = (count - 1, original)
                    else:
                        setattr(config, name, original)
