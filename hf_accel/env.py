"""What this machine and installation have: versions, processor, the C++ ops, GPU. For bug reports; changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import hf_accel

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "peft", "accelerate", "triton")
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def report() -> dict[str, str]:
    """Name -> value, in the order to be printed."""
    import torch

    from hf_accel_kernels.cpu import library

    lines = {"hf-accel": hf_accel.__version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    for package in PACKAGES:
        version = _version(package)
        if version:
            lines[package] = torch.__version__ if package == "torch" else version  # with its build: +cpu, +cu130
    name, features = _cpu()
    lines["processor"] = name
    lines["features"] = " ".join(features) or "none known"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines["threads"] = f"{torch.get_num_threads()} used by torch, {usable} processors usable"
    found, reason = library.load()
    lines["C++ ops"] = f"built, in {library.build()}" if found is not None else f"not built: {reason}"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        lines["GPU"] = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        lines["GPU"] = "none that torch can use"
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> tuple[str, list[str]]:
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux
    return name, [feature for feature in CPU_FEATURES if feature in flags]
