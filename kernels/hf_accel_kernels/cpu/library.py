"""Builds the C++ ops once for this machine and loads them with ctypes (plain C ABI: no torch headers, any Python).

Owns the shared library and its cache folder. Knows nothing about what the functions do. Without a compiler, or with
`HF_ACCEL_CPU_OPS=0`, `load()` returns None with a reason, and the callers take their torch form.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "" or None and the reason why there is none."""
    if os.environ.get("HF_ACCEL_CPU_OPS", "1") == "0":
        return None, "switched off by HF_ACCEL_CPU_OPS=0"
    try:
        return ctypes.CDLL(str(build())), ""
    except (OSError, RuntimeError) as error:
        return None, str(error)


def build() -> Path:
    """Compile the sources for this machine unless that was done before; returns the library's path.

    The architecture is the machine's own; `HF_ACCEL_CPU_ARCH` (a value of g++'s -march, such as "x86-64-v3") overrides it.

    Raises:
        RuntimeError: there is no C++ compiler, or it refused the sources; the message says which.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler found: install g++ for the fast CPU ops")
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise RuntimeError("no C++ sources are installed")
    flags = [
        *_arch_flags(),
        "-O3",
        "-std=c++17",
        "-fopenmp",
        "-shared",
        "-fPIC",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]
    digest = hashlib.sha256()
    for path in sorted([*sources, *SOURCES.glob("*.h")]):
        digest.update(path.read_bytes())
    digest.update(" ".join([compiler, *flags, platform.machine(), _cpu_flags()]).encode())
    target = cache_folder() / f"hf_accel_cpu_{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        scratch = Path(folder) / target.name
        result = subprocess.run(
            [compiler, *flags, *map(str, sources), "-o", str(scratch)], capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"{compiler} failed: {result.stderr.strip()[-2000:]}")
        scratch.replace(target)
    return target


def cache_folder() -> Path:
    """Where built libraries are kept: `HF_ACCEL_CACHE`, else the user's cache folder."""
    base = os.environ.get("HF_ACCEL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_accel"


def _arch_flags() -> list[str]:
    arch = os.environ.get("HF_ACCEL_CPU_ARCH")
    if arch:
        return [f"-march={arch}"]
    return ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"]


def _cpu_flags() -> str:
    """The processor's feature flags, so that a cache folder shared by different machines keeps one build for each."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()
