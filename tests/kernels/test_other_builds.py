"""The C++ ops' tests on builds for other instruction sets, and without the library, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif("x86" not in os.uname().machine, reason="names x86 architectures")

FOLDER = Path(__file__).parent
NEEDED = {
    "x86-64": "sse2",
    "x86-64-v3": "avx2",
    "x86-64-v4": "avx512bw",
    "cooperlake": "avx512_bf16",
}  # of /proc/cpuinfo
PAGED = "test_head_dims or test_group_sizes or test_window or test_random or test_threads or test_store"
SELECTIONS = {
    "test_paged_attention.py": f"({PAGED}) and not attend_torch",
    "test_mla.py": "cpu",
    "test_moe.py": "",
    "test_packed_linear.py": "",
    "test_fused_decoder.py": "",
}
RUNS = [
    *((arch, name) for arch in NEEDED for name in ("test_paged_attention.py", "test_mla.py")),
    *((arch, "test_moe.py") for arch in ("x86-64", "x86-64-v3", "x86-64-v4")),
    *((arch, "test_packed_linear.py") for arch in ("x86-64-v3", "x86-64-v4", "cooperlake")),
    ("x86-64-v3", "test_fused_decoder.py"),
]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each architecture: its library is built once for all the files."""
    return tmp_path_factory.mktemp("builds")


def run_tests(name: str, selection: str, **environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(FOLDER / name),
        "-k",
        selection,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), sorted(RUNS))
def test_other_instruction_sets(arch: str, name: str, builds: Path) -> None:
    """The same sources for SSE, AVX2, AVX512, and AVX512 with bf16 dot products but no tiles."""
    if f" {NEEDED[arch]}" not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {NEEDED[arch]}")
    run_tests(name, SELECTIONS[name], HF_ACCEL_CPU_ARCH=arch, HF_ACCEL_CACHE=str(builds / arch))
    assert len(list((builds / arch).glob("*.so"))) == 1


def test_without_the_library(tmp_path: Path) -> None:
    selection = "torch and not cpu and not threads and not chunks"
    run_tests("test_mla.py", selection, HF_ACCEL_CPU_OPS="0", HF_ACCEL_CACHE=str(tmp_path))
    assert not list(tmp_path.glob("*.so"))
