"""Compiles what an op launches, for a chip that is not there, and reads what the machine code uses.

Run in a process without TRITON_INTERPRET, an interpreted kernel cannot be compiled: `test_compile.py` starts
`python -m tests.kernels.triton.chips`, which prints one JSON line for each case and chip. The assembler and disassembler are triton's own.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHIPS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may ask for
INSTRUCTIONS = ("HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "HMMA", "QMMA", "LDGSTS", "UTMALDG", "LDG", "LDL", "STL")
TENSOR_CORE = ("HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "HMMA", "QMMA")


@dataclass(frozen=True)
class Case:
    """One call of an op on CPU tensors, whose launches are compiled instead of started.

    Attributes:
        run: makes the call; shapes that become constexprs are those of a real model.
        tensor_cores: names of kernels that must use tensor cores.
        pipelined: names of kernels whose loads must be asynchronous copies for the most part.
        spills: (major, minor) of triton -> {kernel: bytes of stack that it may use there}; none by default.
        chips: that it is compiled for.
    """

    run: Callable[[], object]
    tensor_cores: tuple[str, ...] = ()
    pipelined: tuple[str, ...] = ()
    spills: dict[tuple[int, int], dict[str, int]] | None = None
    chips: tuple[int, ...] = CHIPS


def all_cases() -> dict[str, Case]:
    """ "file: case" -> case, over every `cases_*.py` beside this file."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        module = importlib.import_module(f"tests.kernels.triton.{path.stem}")
        found |= {f"{path.stem.removeprefix('cases_')}: {name}": case for name, case in module.CASES.items()}
    return found


def compile_case(name: str, chip: int) -> list[dict[str, Any]]:
    """What each kernel of a case uses on a chip, one entry for each distinct machine code."""
    found: dict[bytes, dict[str, Any]] = {}

    def compile_launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **keywords)
        binary = compiled.asm["cubin"]
        if binary not in found:
            found[binary] = {"kernel": kernel.__name__, "shared": compiled.metadata.shared} | _resources(binary)

    from hf_accel_kernels.triton_ops import launch

    _pretend_gpu(chip)
    launch.compiler = (chip, compile_launch)
    try:
        all_cases()[name].run()
    finally:
        launch.compiler = None
    return list(found.values())


def _resources(binary: bytes) -> dict[str, Any]:
    import triton.backends.nvidia

    folder = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _output([folder / "cuobjdump", "--dump-resource-usage", file.name])
        code = _output([folder / "nvdisasm", "-c", file.name]) or _output([folder / "cuobjdump", "-sass", file.name])
    fields = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(rf"(?<![A-Z.]){name}\b", code)) for name in INSTRUCTIONS}
    return {"registers": fields["REG"], "stack": fields["STACK"] + fields["LOCAL"], "instructions": counts}


def _output(command: list[Any]) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True).stdout


def _pretend_gpu(chip: int) -> None:
    """Let triton of this process see one GPU, the chip."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """As much of triton's driver as `warmup` asks for."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", chip, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        get_current_device = staticmethod(lambda: chip)  # compiled kernels are kept by device
        set_current_device = staticmethod(lambda device: None)
        get_current_stream = staticmethod(lambda device: 0)
        get_device_interface = staticmethod(lambda: None)
        is_active = staticmethod(lambda: True)

    triton.runtime.driver.set_active(Driver())


def _report(job: tuple[str, int]) -> str:
    name, chip = job
    try:
        return json.dumps({"case": name, "chip": chip, "kernels": compile_case(name, chip)})
    except Exception:
        return json.dumps({"case": name, "chip": chip, "error": traceback.format_exc(limit=-4)})


def main() -> None:
    """Arguments: parts of the cases' names; none for all of them."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "an interpreted kernel cannot be compiled"
    wanted = sys.argv[1:]
    cases = {n: c for n, c in all_cases().items() if not wanted or any(part in n for part in wanted)}
    jobs = [(name, chip) for name, case in cases.items() for chip in case.chips]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for line in pool.map(_report, jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
