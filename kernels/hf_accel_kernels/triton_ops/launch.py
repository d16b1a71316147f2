"""The one way in which a Triton kernel is started, and which chip it is started for.

Owns what all launches share: explicit fp-fusion (triton 3.10 turns it off by default) and the seam through which tests
compile the very launches of an op for a chip that is not there. Configurations are tables in each op's file, by capability:
no autotuning, whose timing runs would stall a serving step.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

LOWEST_CAPABILITY = 80  # bf16 tensor cores and asynchronous copies

Grid = tuple[int, ...]
compiler: tuple[int, Callable[..., Any]] | None = None
"""(capability, function called instead of a launch): set by tests that compile for a chip."""


def why_not(device: torch.device) -> str:
    """ "" where Triton kernels run on `device`, else the reason in words."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    return _why_not_cuda(device.index)


def capability(device: torch.device) -> int:
    """10 * major + minor compute capability that `device` runs; 90 for the CPU, where kernels are interpreted."""
    if compiler is not None:
        return compiler[0]
    return _cuda_capability(device.index) if device.type == "cuda" else 90


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; an H100's for the CPU."""
    return _cuda_processors(device.index) if device.type == "cuda" else 132


def launch(kernel: Any, grid: Grid, *args: Any, num_warps: int = 4, num_stages: int = 1, **constexprs: Any) -> None:
    """Start `kernel` (a `triton.jit` function) on `grid` with positional arguments and constexpr keywords."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if compiler is not None:
        compiler[1](kernel, grid, args, constexprs | options)
        return
    kernel[grid](*args, **constexprs, **options)


@functools.cache
def _why_not_cuda(index: int | None) -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if _cuda_capability(index) < LOWEST_CAPABILITY:
        return f"Triton kernels need compute capability 8.0, {torch.cuda.get_device_name(index)} has less"
    return ""


@functools.cache
def _cuda_capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _cuda_processors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
