"""What the cases of a section are run with: device, sizes, the card's ceilings, time left, and where rows go."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu import record
from hf_accel.config import EngineConfig


class NotThere(Exception):
    """What a case wants to measure does not exist in this checkout or on this machine; the message says what."""


@dataclass
class Ceilings:
    """What the card reaches: bytes a second copied (read and write counted), and bf16 FLOPs a second of a large GEMM.

    The floors of everything else are taken from these; 0 is "not measured yet".
    """

    copy: float = 0.0
    gemm: float = 0.0

    def floor_ms(self, num_bytes: float, flops: float) -> tuple[float | None, str]:
        """The time that the bytes or the FLOPs take at least, and which of the two it is."""
        by_bytes = 1000 * num_bytes / self.copy if self.copy else 0.0
        by_flops = 1000 * flops / self.gemm if self.gemm else 0.0
        if not by_bytes and not by_flops:
            return None, ""
        return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")


@dataclass
class Context:
    """Handed to every case.

    Attributes:
        section: whose rows these are.
        device: where to measure.
        smoke: tiny shapes, to see that everything runs.
        ceilings: filled by the first section.
        deadline: of the section, on `time.monotonic`'s clock.
        emit: takes a finished row.
    """

    section: str
    device: torch.device
    smoke: bool
    ceilings: Ceilings
    deadline: float
    emit: Callable[[dict[str, Any]], None]
    case: str = ""
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU; fp32 on CPU, where outputs can be compared exactly."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def remaining(self) -> float:
        """Seconds left to the section."""
        return self.deadline - time.monotonic()

    def row(self, form: str, metric: str, value: float | None = None, **more: Any) -> None:
        """Record a figure of the present case."""
        self.emit(record.row(self.section, self.case, form, metric, value, **more))

    def pick(self, full: Any, smoke: Any) -> Any:
        """A size of the real run or of the smoke run."""
        return smoke if self.smoke else full

    def floor(self, num_bytes: float, flops: float, ms: float) -> dict[str, Any]:
        """The columns of a floor for a measured time."""
        floor, bound = self.ceilings.floor_ms(num_bytes, flops)
        return {"floor": floor, "bound": bound, "share": None if floor is None else floor / ms}


@dataclass(frozen=True)
class Case:
    """Something that is measured and reported on its own.

    Attributes:
        name: in its section.
        run: measures and records rows.
        limit: seconds after which it counts as hung.
        least: seconds without which it is not begun.
    """

    name: str
    run: Callable[[Context], None]
    limit: float = 60.0
    least: float = 2.0


def known_options(**options: Any) -> dict[str, Any]:
    """Those of the options that this checkout's EngineConfig has."""
    known = {f.name for f in dataclasses.fields(EngineConfig)}
    return {name: value for name, value in options.items() if name in known}
