"""Every example runs, offline, and is short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("[0-9]*.py"))


def run(*args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    assert len(path.read_text().splitlines()) <= 40
    assert run(path).strip()


def test_unchanged_script_prints_the_same_accelerated():
    script = next(path for path in EXAMPLES if "unchanged" in path.name)
    assert "import hf_accel" not in script.read_text()
    assert run("-m", "hf_accel", "run", script) == run(script)
