"""From a constraint and a vocabulary to a token automaton: compiled once, in a thread of its own, kept in memory and on disk.

What has no automaton may become a grammar of the dynamic backend. Owns the caches and the caps. A cached file is plain arrays: nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hf_accel.structured.constraint import Constraint
from hf_accel.structured.dynamic import DynamicBackend, DynamicGrammar, is_allowed
from hf_accel.structured.syntax import CounterConflict, StructureError
from hf_accel.structured.time_limit import time_limit
from hf_accel.structured.token_fsm import TokenFsm, compile_fsm
from hf_accel.structured.vocabulary import Vocabulary

MAX_SECONDS = 20.0
FORMAT = 2  # of cached files and of what their contents mean
MEMORY_BYTES = 512 << 20  # of automata kept in memory
MAX_COMPILERS = 8  # of one tokenizer
_FIELDS = tuple(TokenFsm.__dataclass_fields__)

Compiled = TokenFsm | DynamicGrammar


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
        self._dynamic = DynamicBackend(vocabulary)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[Compiled]] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-accel-constraints")

    def submit(self, constraint: Constraint) -> Future[Compiled]:
        """Start compiling, or find what was compiled; the result, or its StructureError, comes by the future."""
        key = constraint.digest
        with self._lock:
            future = self._known.get(key)
            if future is None:
                future = self._known[key] = self._pool.submit(self._compile_or_forget, key, constraint)
            self._known.move_to_end(key)
            self._forget_oldest()
            return future

    def compile(self, constraint: Constraint) -> Compiled:
        """`submit` and wait.

        Raises:
            StructureError: see `Constraint.compile`, `compile_fsm` and `DynamicBackend.compile`.
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

    def _compile_or_forget(self, key: str, constraint: Constraint) -> Compiled:
        """A failure is not kept: whoever it is raised to hangs on its traceback, an engine among them."""
        try:
            return self._compile(constraint)
        except BaseException:
            with self._lock:
                self._known.pop(key, None)
            raise

    def _compile(self, constraint: Constraint) -> Compiled:
        path = self._path(constraint)
        if path is not None and (fsm := load(path)) is not None:
            return fsm
        try:
            with time_limit(self._max_seconds):
                fsm = self._automaton(constraint)
        except StructureError as error:
            if not is_allowed(error, constraint.kind):
                raise
            refusal = error
        else:
            if path is not None:
                save(fsm, path)
            return fsm
        return self._dynamic.compile(constraint, refusal)

    def _automaton(self, constraint: Constraint) -> TokenFsm:
        try:
            return compile_fsm(constraint.compile(), self.vocabulary)
        except CounterConflict:
            return compile_fsm(constraint.compile(counting=False), self.vocabulary)

    def _path(self, constraint: Constraint) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"fsm_{FORMAT}_{constraint.digest[:24]}_{self.vocabulary.digest[:24]}.npz"


_compilers: weakref.WeakKeyDictionary[Any, OrderedDict[object, ConstraintCompiler]] = weakref.WeakKeyDictionary()
_compilers_lock = threading.Lock()


def compiler_for(tokenizer: Any, eos_token_ids: Iterable[int], vocab_size: int | None = None) -> ConstraintCompiler:
    """The process's compiler for a tokenizer and its ends; whoever asks for the same shares it.

    Ids past the tokenizer's last token are never allowed, so that logits of any greater width share one.

    Args:
        tokenizer: a fast HF tokenizer.
        eos_token_ids: ids that end a generation.
        vocab_size: width of the logits; None: no less than the tokenizer has tokens.

    Raises:
        StructureError: there is no end of sequence; or see `Vocabulary.of`.
    """
    eos = tuple(sorted({i for i in eos_token_ids if vocab_size is None or i < vocab_size}))
    if not eos:
        raise StructureError(
            "a constraint needs an end of sequence: give eos_token_ids, or set generation_config.eos_token_id"
        )
    size = max(len(tokenizer), eos[-1] + 1)
    size = size if vocab_size is None else min(size, vocab_size)
    folder = cache_folder()
    special = tuple(getattr(tokenizer, "all_special_ids", ()))
    key = (size, eos, folder, len(tokenizer), special)
    with _compilers_lock:
        try:
            known = _compilers.setdefault(tokenizer, OrderedDict())
        except TypeError:  # it has no hash, or no weak references
            known = OrderedDict()
        if key not in known:
            known[key] = ConstraintCompiler(Vocabulary.of(tokenizer, size, eos), folder)
        known.move_to_end(key)
        while len(known) > MAX_COMPILERS:
            known.popitem(last=False)
        return known[key]


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
