"""Every kernel compiles for every chip: nothing spilled, shared memory that fits, tensor cores and asynchronous loads used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from .chips import SHARED_LIMIT, TENSOR_CORE, all_cases  # noqa: E402

CASES = all_cases()
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int], Any]:
    """What the compiled cases use, by case and chip."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.kernels.triton.chips"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {(line["case"], line["chip"]): line for line in lines}


@pytest.mark.parametrize(("name", "chip"), [(name, chip) for name, case in CASES.items() for chip in case.chips])
@pytest.mark.timeout(600)
def test_compiles(name: str, chip: int, reports: dict[tuple[str, int], Any]) -> None:
    report, case = reports[name, chip], CASES[name]
    assert "error" not in report, report.get("error")
    assert report["kernels"], "the case launched nothing"
    names = {kernel["kernel"] for kernel in report["kernels"]}
    assert names >= {*case.tensor_cores, *case.pipelined}
    allowed = (case.spills or {}).get(VERSION, {})
    for kernel in report["kernels"]:
        kind, counts = kernel["kernel"], kernel["instructions"]
        assert kernel["shared"] <= SHARED_LIMIT[chip], kernel
        assert kernel["stack"] <= allowed.get(kind, 0), kernel
        if kind in case.tensor_cores:
            assert any(counts[i] for i in TENSOR_CORE), kernel
        if kind in case.pipelined:
            assert counts["LDGSTS"] + counts["UTMALDG"] > 0, kernel
            assert counts["LDG"] <= counts["LDGSTS"] + counts["UTMALDG"], kernel
