"""Ctrl-C waits for the end of bookkeeping, and reaches the handler that was there."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from hf_accel.engine.interrupts import interrupts_deferred


@pytest.fixture(autouse=True)
def _python_handles_sigint() -> Iterator[None]:
    """A run that a shell put in the background starts with SIGINT ignored."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def _interrupted(done: list[str], open_gate: bool) -> None:
    with interrupts_deferred() as gate, gate.open() if open_gate else contextlib.nullcontext():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler runs between two bytecodes of this thread
        done.append("the block ran to its end")


@pytest.mark.parametrize("open_gate", [False, True])
def test_an_interrupt_waits_for_the_end_of_the_block_unless_the_gate_is_open(open_gate: bool) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(done, open_gate)
    assert bool(done) is not open_gate
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_handlers_are_left_alone() -> None:
    seen: list[int] = []
    old = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert not seen
        assert seen == [signal.SIGINT]

        def work() -> None:
            with interrupts_deferred():
                pass

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, old)
