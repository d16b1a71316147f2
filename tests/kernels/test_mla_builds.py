"""The latent attention tests on other builds of the C++ library, and without it, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("test_mla.py")
NEEDED = {"x86-64-v4": "avx512bw", "cooperlake": "avx512_bf16"}  # flags of /proc/cpuinfo


def run_tests(selection: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS), "-k", selection]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parents[2])
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.skipif("x86" not in os.uname().machine, reason="names x86 architectures")
@pytest.mark.parametrize(
    "arch", ["x86-64-v3", *(pytest.param(a, marks=pytest.mark.slow) for a in ("x86-64", "x86-64-v4", "cooperlake"))]
)
def test_other_architectures(arch: str, tmp_path: Path) -> None:
    """The same source for AVX2, SSE, AVX512, and AVX512 with bf16 dot products but no tiles."""
    if NEEDED.get(arch, "") not in Path("/proc/cpuinfo").read_text():
        pytest.skip("not on this processor")
    run_tests("cpu", HF_ACCEL_CPU_ARCH=arch, HF_ACCEL_CACHE=str(tmp_path))
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_without_the_library(tmp_path: Path) -> None:
    run_tests("torch and not cpu and not threads and not chunks", HF_ACCEL_CPU_OPS="0", HF_ACCEL_CACHE=str(tmp_path))
    assert not list(tmp_path.glob("*.so"))
