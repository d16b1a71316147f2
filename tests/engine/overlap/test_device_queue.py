"""The device's order and its idle time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hf_accel.engine.device_queue import WorkerQueue
from hf_accel.engine.idle_meter import IdleMeter

from ..api.hf_answers import greedy, ids_of
from .device import wrap_forward


@dataclass
class FakeSpan:
    start: float
    end: float
    done: bool = True

    def seconds(self) -> float:
        return self.end - self.start

    def seconds_after(self, earlier: FakeSpan) -> float:
        return self.start - earlier.end


def test_jobs_run_in_order_in_one_thread_with_torchs_defaults():
    queue, seen = WorkerQueue(), []
    with torch.inference_mode():
        tickets = [
            queue.submit(lambda i=i: seen.append((i, threading.get_ident(), torch.is_inference_mode_enabled())) or i)
            for i in range(50)
        ]
        assert queue.run(lambda: len(seen)) == 50  # in this thread, behind them
    assert [ticket.result() for ticket in tickets] == list(range(50))
    assert [i for i, *_ in seen] == list(range(50)) and {mode for *_, mode in seen} == {False}
    assert len({ident for _, ident, _ in seen}) == 1 and threading.get_ident() not in {ident for _, ident, _ in seen}
    queue.close()


def test_after_a_failure_nothing_runs_until_it_was_noticed():
    queue, seen = WorkerQueue(), []
    first, second = queue.submit(lambda: 1 / 0), queue.submit(lambda: seen.append(1))
    for ticket in (first, second):
        ticket.wait()
    with pytest.raises(ZeroDivisionError):
        first.result()
    with pytest.raises(RuntimeError, match="launched before failed"):
        second.result()
    queue.synchronize()
    queue.submit(lambda: seen.append(2)).result()
    assert seen == [2]
    queue.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_thread_of_its_own():
    queue = WorkerQueue()
    assert queue.submit(lambda: 7).result() == 7
    pid = os.fork()
    if pid == 0:
        os._exit(0 if queue.submit(lambda: 8).result() == 8 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    queue.close()


def test_gaps_count_within_a_busy_period_only():
    meter = IdleMeter()
    for start, end in ((1, 2), (2.5, 4), (3.9, 5)):  # the last one begins early: clocks of two threads
        meter.add(FakeSpan(start, end))
    meter.pause()
    meter.pause()
    meter.add(FakeSpan(100, 101))
    busy, idle = meter.seconds
    assert (busy, idle) == (pytest.approx(1 + 1.5 + 1.1 + 1), pytest.approx(0.5))
    late = FakeSpan(103, 104, done=False)
    meter.add(late)
    meter.add(FakeSpan(104, 105))
    assert meter.seconds[0] == pytest.approx(busy)  # in order, when they are over
    late.done = True
    assert meter.seconds == (pytest.approx(busy + 2), pytest.approx(idle + 2))


def test_the_idle_share_falls_when_the_host_runs_ahead(make_engine, monkeypatch):
    shares = {}
    for overlap in (False, True):
        engine = make_engine(overlap)
        assert engine.stats().device_idle_share == 0.0
        schedule = engine.core.scheduler.schedule

        def slow_host(schedule=schedule):
            time.sleep(0.02)
            return schedule()

        def slow_device(batch, forward):
            time.sleep(0.03)
            return forward()

        monkeypatch.setattr(engine.core.scheduler, "schedule", slow_host)
        wrap_forward(engine, slow_device)
        for _ in range(2):
            engine.generate([ids_of(1, 8)], greedy(7))
            time.sleep(0.2)  # nothing to do: not the host's fault
        shares[overlap] = engine.stats().device_idle_share
        engine.shutdown()
    assert 0.25 < shares[False] < 0.8 and shares[True] < shares[False] / 2


LEAVES = """
from tests.tiny import make_tiny_llama
from hf_accel import Engine, SamplingParams
engine = Engine(make_tiny_llama(), overlap=True, num_pages=64)
engine.add_request([1, 2, 3] * 40, SamplingParams(max_tokens=400, temperature=0))
engine.step()
print("bye")
"""


def test_a_process_may_end_with_a_step_in_flight():
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", LEAVES], cwd=root, env=environment, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout) == (0, "bye\n"), ended.stderr[-2000:]
