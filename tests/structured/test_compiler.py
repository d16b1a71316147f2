"""Compiled constraints are made once, survive the process, and never fail for a bad file."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hf_accel.structured import compiler as module
from hf_accel.structured.compiler import ConstraintCompiler, load, save
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.vocabulary import Vocabulary

FIELDS = ("masks", "rows", "row_of", "classes", "table", "counts")
VOCABULARY = Vocabulary((*(bytes([b]) for b in range(256)), None), (256,))


@pytest.fixture
def count(monkeypatch) -> list[int]:
    calls = []
    real = module.compile_fsm
    monkeypatch.setattr(module, "compile_fsm", lambda *args: (calls.append(1), real(*args))[1])
    return calls


def equal(a, b) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def test_once_in_memory_and_once_on_disk(tmp_path, count):
    first, second = ConstraintCompiler(VOCABULARY, tmp_path), ConstraintCompiler(VOCABULARY, tmp_path)
    made = first.compile(Constraint.regex("[ab]+c"))
    assert first.compile(Constraint.regex("[ab]+c")) is made and len(count) == 1
    assert equal(second.compile(Constraint.regex("[ab]+c")), made) and len(count) == 1
    other = Vocabulary((*VOCABULARY.tokens[:-1], b"ab", None), (257,))
    ConstraintCompiler(other, tmp_path).compile(Constraint.regex("[ab]+c"))
    assert len(count) == 2, "another vocabulary is another automaton"


def test_threads_share_one_compilation(count):
    compiler, found = ConstraintCompiler(VOCABULARY), []
    threads = [
        threading.Thread(target=lambda: found.append(compiler.compile(Constraint.regex("(a|b){1,9}"))))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1 and len({id(f) for f in found}) == 1


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut"])
def test_a_bad_file_is_made_anew(tmp_path, content, count):
    compiler = ConstraintCompiler(VOCABULARY, tmp_path)
    path = compiler._path(Constraint.regex("a"))
    path.write_bytes(content)
    assert compiler.compile(Constraint.regex("a")).num_states == 3 and len(count) == 1
    assert load(path) is not None


def test_a_file_whose_ids_do_not_fit_is_not_used(tmp_path):
    fsm = ConstraintCompiler(VOCABULARY).compile(Constraint.regex("a|b"))
    for field, wrong in (
        ("table", fsm.table + 99),
        ("row_of", fsm.row_of[:-1]),
        ("classes", fsm.classes.astype(np.int64)),
    ):
        arrays = {f: getattr(fsm, f) for f in FIELDS} | {field: wrong}
        np.savez(tmp_path / "x.npz", **arrays)
        assert load(tmp_path / "x.npz") is None
    save(fsm, tmp_path / "y.npz")
    assert equal(load(tmp_path / "y.npz"), fsm)


def test_failures_come_by_the_future_and_are_tried_again(count):
    compiler = ConstraintCompiler(VOCABULARY)
    for _ in range(2):
        with pytest.raises(StructureError, match="lookahead"):
            compiler.compile(Constraint.regex("(?=a)"))
    assert compiler.compile(Constraint.regex("a")).num_states == 3


def test_memory_is_bounded(monkeypatch, count):
    monkeypatch.setattr(module, "MEMORY_BYTES", 1)
    compiler = ConstraintCompiler(VOCABULARY)
    for pattern in ("a", "b", "c", "a"):
        compiler.compile(Constraint.regex(pattern))
    compiler.submit(Constraint.regex("a"))
    assert len(compiler._known) == 1 and len(count) == 4
