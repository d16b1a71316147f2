"""From a constraint and a vocabulary to a token automaton: compiled once, in a thread of its own, kept in memory and on disk.

Owns the caches and the caps. A cached file is plain arrays: nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import zipfile
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hf_accel.structured.constraint import Constraint
from hf_accel.structured.syntax import CounterConflict
from hf_accel.structured.time_limit import time_limit
from hf_accel.structured.token_fsm import TokenFsm, compile_fsm
from hf_accel.structured.vocabulary import Vocabulary

MAX_SECONDS = 20.0
FORMAT = 2  # of cached files and of what their contents mean
MEMORY_BYTES = 512 << 20  # of automata kept in memory
_FIELDS = tuple(TokenFsm.__dataclass_fields__)


class ConstraintCompiler:
    """Compiles for one vocabulary. Any thread may call; equal constraints are compiled once.

    Args:
        vocabulary: of the model.
        folder: where compiled automata are kept; None: nowhere.
        max_seconds: of processor time for one constraint; one that takes more is refused.
    """

    def __init__(self, vocabulary: Vocabulary, folder: Path | None = None, max_seconds: float = MAX_SECONDS) -> None:
        self.vocabulary = vocabulary
        self._folder, self._max_seconds = folder, max_seconds
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[TokenFsm]] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-accel-constraints")

    def submit(self, constraint: Constraint) -> Future[TokenFsm]:
        """Start compiling, or find what was compiled; the result, or its StructureError, comes by the future."""
        key = constraint.digest
        with self._lock:
            future = self._known.get(key)
            if future is None or (future.done() and future.exception() is not None):
                future = self._known[key] = self._pool.submit(self._compile, constraint)
            self._known.move_to_end(key)
            self._forget_oldest()
            return future

    def compile(self, constraint: Constraint) -> TokenFsm:
        """`submit` and wait.

        Raises:
            StructureError: see `Constraint.compile` and `compile_fsm`.
        """
        return self.submit(constraint).result()

    def _forget_oldest(self) -> None:
        done = [(k, f.result().num_bytes) for k, f in self._known.items() if f.done() and f.exception() is None]
        total = sum(num_bytes for _, num_bytes in done)
        for key, num_bytes in done[:-1]:
            if total <= MEMORY_BYTES:
                return
            del self._known[key]
            total -= num_bytes

    def _compile(self, constraint: Constraint) -> TokenFsm:
        path = self._path(constraint)
        if path is not None and (fsm := load(path)) is not None:
            return fsm
        with time_limit(self._max_seconds):
            try:
                fsm = compile_fsm(constraint.compile(), self.vocabulary)
            except CounterConflict:
                fsm = compile_fsm(constraint.compile(counting=False), self.vocabulary)
        if path is not None:
            save(fsm, path)
        return fsm

    def _path(self, constraint: Constraint) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"fsm_{FORMAT}_{constraint.digest[:24]}_{self.vocabulary.digest[:24]}.npz"


def save(fsm: TokenFsm, path: Path) -> None:
    """Write an automaton; a folder that cannot be written to is let be."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez_compressed(file, **{name: getattr(fsm, name) for name in _FIELDS})
        os.replace(file.name, path)


def load(path: Path) -> TokenFsm | None:
    """Read an automaton; None where there is none, or none that is whole."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            fsm = TokenFsm(*(arrays[name] for name in _FIELDS))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return fsm if fsm.is_consistent else None


def cache_folder() -> Path:
    """Where compiled automata are kept: `HF_ACCEL_CACHE`, else the user's cache folder."""
    base = os.environ.get("HF_ACCEL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_accel"
