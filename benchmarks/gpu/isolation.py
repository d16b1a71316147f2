"""Sections in processes of their own, so that a hang, a crash or a poisoned CUDA context costs one case and no more.

A process runs the cases of one section in order and sends what happens over a pipe. When it dies, or a case outlasts its
limit, the parent reports that case and starts another process for those after it. The next process is started ahead of
time, so that its imports do not cost the run. Messages: ("ready",), then ("begin", case), ("row", row),
("end", case, seconds, status, note) for each case, and ("done",), or ("broken",) when the device cannot be used any more.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

MAX_RESTARTS = 3
Message = tuple[Any, ...]
Send = Callable[[Message], None]


def run_cases(order: dict[str, Any], skip: Iterable[str], send: Send) -> bool:
    """Run a section's cases but those in `skip`; False if the device cannot be used any more.

    `order`: module, section, device, smoke, copy, gemm, deadline, only (parts of case names, one of which must occur).
    """
    import torch

    from benchmarks.gpu.context import Ceilings, Context, NotThere

    module = importlib.import_module(order["module"])
    ctx = Context(
        order["section"], torch.device(order["device"]), order["smoke"], Ceilings(order["copy"], order["gemm"]),
        order["deadline"], lambda row: send(("row", row)),
    )  # fmt: skip
    for case in module.cases(ctx):
        if case.name in skip or (order["only"] and not any(part in case.name for part in order["only"])):
            continue
        if ctx.remaining < case.least:
            send(("end", case.name, 0.0, "skipped", f"{max(0.0, ctx.remaining):.0f} s left"))
            continue
        send(("begin", case.name, min(case.limit, max(ctx.remaining, case.least) + 15)))
        start, status, note = time.monotonic(), "ok", ""
        ctx.case = case.name
        try:
            case.run(ctx)
        except NotThere as reason:
            status, note = "not there", str(reason)
        except Exception as error:
            status, note = "failed", describe(error)
        send(("end", case.name, time.monotonic() - start, status, note))
        gc.collect()
        if ctx.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return False
    return True


def describe(error: BaseException) -> str:
    """One line: what was raised, and where in this repository."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def serve(pipe: Connection) -> None:
    """A measuring process: imports first, then the section that the parent names."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import hf_accel  # noqa: F401

    pipe.send(("ready",))
    try:
        order, skip = pipe.recv()
        quiet()
        pipe.send(("done",) if run_cases(order, skip, pipe.send) else ("broken",))
        pipe.close()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    os._exit(0)  # threads of other libraries may hang, and nothing is left to write


def quiet() -> None:
    """Leave only errors of the libraries on the terminal."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hf_accel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


class Workers:
    """Measuring processes, one of them ready ahead of time."""

    def __init__(self) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._spare: tuple[Any, Connection] | None = None

    def prepare(self) -> None:
        """Start the next process now."""
        if self._spare is None:
            ours, theirs = self._spawn.Pipe()
            process = self._spawn.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._spare = process, ours

    def run(self, order: dict[str, Any], *, more: bool) -> Iterator[Message]:
        """The messages of a section, over as many processes as it takes; `more`: another section follows."""
        skip: list[str] = []
        for _ in range(MAX_RESTARTS + 1):
            self.prepare()
            assert self._spare is not None
            process, pipe = self._spare
            self._spare = None
            running: str | None = None
            for message in self._converse(process, pipe, (order, skip), more):
                if message[0] == "done":
                    return
                if message[0] == "broken":
                    break
                if message[0] == "begin":
                    running = message[1]
                elif message[0] == "end":
                    running = None
                    skip.append(message[1])
                elif message[0] == "lost":
                    name = running or "(start)"
                    skip.append(name)
                    yield ("end", name, message[1], "failed", message[2])
                    continue
                yield message
            if time.monotonic() > order["deadline"]:
                return

    def _converse(self, process: Any, pipe: Connection, order: Any, more: bool) -> Iterator[Message]:
        """Messages until the process is done or lost; ("lost", seconds, why) ends them where it is."""
        limit, began = 120.0, time.monotonic()
        try:
            while True:
                if not pipe.poll(max(0.1, began + limit - time.monotonic())):
                    yield ("lost", time.monotonic() - began, f"hung: killed after {limit:.0f} s")
                    return
                message = pipe.recv()
                if message[0] == "ready":
                    pipe.send(order)
                    if more:
                        self.prepare()
                    continue
                if message[0] in ("begin", "end"):
                    began, limit = time.monotonic(), message[2] if message[0] == "begin" else 60.0
                yield message
        except (EOFError, OSError):
            process.join(5)
            yield ("lost", time.monotonic() - began, f"the process ended with exit code {process.exitcode}")
        finally:
            self._end(process, pipe)

    def close(self) -> None:
        """End the process that waits."""
        if self._spare is not None:
            self._end(*self._spare)
            self._spare = None

    @staticmethod
    def _end(process: Any, pipe: Connection) -> None:
        pipe.close()
        process.join(0.5)
        if process.is_alive():
            process.kill()
            process.join(10)
