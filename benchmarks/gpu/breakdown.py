"""Where the device's time in a step goes, by kernel, as torch's profiler sees it; and how long the device stands idle."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

NAME_LENGTH = 60


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of device time in a step, by kernel; on CPU, of torch's ops."""

    kernels: Counter[str]

    @property
    def busy_ms(self) -> float:
        """All of them, as if none ran beside another."""
        return sum(self.kernels.values())

    def idle_share(self, step_ms: float) -> float:
        """Share of a step, timed without the profiler, in which no kernel ran."""
        return max(0.0, 1 - self.busy_ms / step_ms)


def profile_steps(run: Callable[[], object], num_steps: int, device: torch.device) -> Breakdown:
    """Profile `run`, which does `num_steps` steps."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        run()
    kernels: Counter[str] = Counter()
    for event in found.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == on_gpu:
            micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels[short_name(event.key)] += micros / 1000 / num_steps
    return Breakdown(kernels)


def short_name(kernel: str) -> str:
    """A kernel's name without return type, template arguments of others and parameters, cut to a column's width."""
    name = re.sub(r"^void ", "", kernel)
    return re.sub(r"\(.*", "", name)[:NAME_LENGTH].strip() or kernel[:NAME_LENGTH]
