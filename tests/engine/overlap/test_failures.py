"""What goes wrong one step late: it hits the guilty one alone, and leaves nothing in flight and nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

import hf_accel
from hf_accel.config import FaultInjection
from hf_accel.engine.sampled import InvalidLogits

from ..api.hf_answers import greedy, hf_greedy, ids_of
from .device import Forwards, device_threads, wrap_forward

PROMPTS = [ids_of(1, 30), ids_of(2, 10), ids_of(3, 25)]
GUILTY = 1
FATAL = 16  # a position that the guilty row alone decodes


def fatal(batch: Any) -> torch.Tensor:
    """[num_logits] bool: the guilty row at the fatal position."""
    return batch.positions[batch.logits_indices] == FATAL


def check_others(outputs: list[Any], model: Any) -> None:
    for index, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        answer = hf_greedy(model, prompt, 20)
        if index == GUILTY:
            assert output.outputs[0].token_ids == answer[: FATAL + 1 - len(prompt)]
            assert output.outputs[0].finish_reason == "error"
        else:
            assert output.error is None and output.outputs[0].token_ids == answer


def test_a_forward_that_fails_hits_the_guilty_row_alone(engine, model):
    calls: list[int] = []

    def around(batch: Any, forward: Any) -> torch.Tensor:
        if fatal(batch).any():
            calls.append(len(batch.query_lens_cpu))
            raise ZeroDivisionError("position 16")
        return forward()

    wrap_forward(engine, around)
    outputs = engine.generate(PROMPTS, greedy(20))
    assert isinstance(outputs[GUILTY].error, ZeroDivisionError)
    check_others(outputs, model)
    assert calls == [3, 3, 1]  # ahead, again in the plain loop, alone


def test_nan_logits_are_that_rows_error_alone(engine, model):
    def around(batch: Any, forward: Any) -> torch.Tensor:
        logits = forward()
        logits[fatal(batch)] = float("nan")
        return logits

    wrap_forward(engine, around)
    forwards = Forwards(engine)
    outputs = engine.generate(PROMPTS, greedy(20))
    assert isinstance(outputs[GUILTY].error, InvalidLogits)
    check_others(outputs, model)
    assert all(forwards.ahead)


@pytest.mark.parametrize("kind", ["device", "signal"])
def test_an_interrupt_in_flight(engine, model, kind):
    """Ctrl-C while the host waits for the device, and one that the device's own code raises."""
    hit: list[bool] = []

    def around(batch: Any, forward: Any) -> torch.Tensor:
        if fatal(batch).any() and not hit:
            hit.append(True)
            if kind == "device":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return forward()

    wrap_forward(engine, around)
    kept = engine.add_request(PROMPTS[0], greedy(20))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS[1:], greedy(20))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not engine.core._overlapped.in_flight and engine.stats().num_running == 1
    assert engine.result(kept).outputs[0].token_ids == hf_greedy(model, PROMPTS[0], 20)
    assert [o.outputs[0].token_ids for o in engine.generate(PROMPTS, greedy(20))] == [
        hf_greedy(model, prompt, 20) for prompt in PROMPTS
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("when", ["build", "before", "after"])
def test_a_launch_that_breaks(make_engine, monkeypatch, assert_idle, error, when):
    """With a step in flight: before the page table took its changes, before and after its own work was queued."""
    engine = make_engine(page_size=1, num_pages=256)  # each step changes the page table
    executor, count = engine.core.executor, []
    part = "build" if when == "build" else "launch"
    original = getattr(executor, part)

    def breaks(*args: Any) -> Any:
        count.append(engine.core._overlapped.in_flight)
        broken = len(count) == 5
        result = original(*args) if when == "after" or not broken else None
        if broken:
            raise error
        return result

    monkeypatch.setattr(executor, part, breaks)
    requests = [engine.add_request(prompt, greedy(20, frequency_penalty=1.0)) for prompt in PROMPTS]
    raised = 0
    while engine.core.scheduler.has_work or engine.core._overlapped.in_flight:
        try:
            engine.core.step()
        except KeyboardInterrupt:
            raised += 1
    assert raised == (error is KeyboardInterrupt) and len(count) > 10 and count[4]
    outputs = [engine.result(i).outputs[0].token_ids for i in requests]
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(executor, "overlaps", False)
        expected = [o.outputs[0].token_ids for o in engine.generate(PROMPTS, greedy(20, frequency_penalty=1.0))]
    assert outputs == expected
    assert_idle(engine)


def test_copies_that_fail_with_a_step_in_flight(make_engine, model, monkeypatch, assert_idle):
    engine = make_engine(max_num_seqs=2)
    pool, in_flight = engine.core.executor.runner.pool, []

    def fails(page_copies: Any) -> None:
        in_flight.append(engine.core._overlapped.in_flight)
        for pages in (*pool.k_pages, *pool.v_pages):
            pages.fill_(1e4)
        raise MemoryError

    first, _ = engine.add_request(PROMPTS[0], greedy(20)), engine.add_request(PROMPTS[1], greedy(4))
    last = engine.add_request(
        PROMPTS[0][:28], greedy(20)
    )  # admitted late; its last page is copied from the first one's
    other = engine.add_request(PROMPTS[2], greedy(20))
    with monkeypatch.context() as patch:
        patch.setattr(pool, "copy_pages", fails)
        with pytest.raises(MemoryError):
            engine.result(last)
    assert in_flight == [True]
    assert engine.stats().num_pages_cached == 0 and engine.stats().num_running == 0
    assert engine.result(first).outputs[0].token_ids == hf_greedy(model, PROMPTS[0], 20)
    assert engine.result(other).outputs[0].token_ids == hf_greedy(model, PROMPTS[2], 20)
    engine.step()  # hands over the short one
    assert_idle(engine)


def test_calls_that_change_the_engine_wait_for_the_step_in_flight(engine, model):
    for change in (engine.check_integrity, engine.invalidate_weights, engine.wake):
        request = engine.add_request(ids_of(1, 9), greedy(6))
        assert engine.step() == [] and engine.core._overlapped.in_flight
        change()
        assert not engine.core._overlapped.in_flight
        assert engine.result(request).outputs[0].token_ids == hf_greedy(model, ids_of(1, 9), 6)
    request = engine.add_request(ids_of(1, 9), greedy(1))
    engine.step()
    engine.flush_cache()  # waits, finds the engine idle
    assert engine.stats().num_pages_cached == 0 and len(engine.result(request).outputs[0].token_ids) == 1


def test_weights_that_change_between_calls(engine, model):
    for factor in (1.0, -1.0, 0.5):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(factor)
        assert [o.outputs[0].token_ids for o in engine.generate(PROMPTS, greedy(9))] == [
            hf_greedy(model, prompt, 9) for prompt in PROMPTS
        ]


def test_a_hook_that_calls_the_engine_from_the_device_thread(model, assert_idle):
    hf_accel.patch(model, num_pages=128, page_size=4, overlap=True, faults=FaultInjection(check_integrity=True))
    engine = hf_accel.get_engine(model)
    handle = model.lm_head.register_forward_hook(lambda *args: engine.generate([[1, 2]], greedy(2)) and None)
    [output] = engine.generate([ids_of(1, 9)], greedy(4))
    assert isinstance(output.error, RuntimeError) and "inside a step of its own" in str(output.error)
    handle.remove()
    assert engine.generate([ids_of(1, 9)], greedy(4))[0].error is None
    assert_idle(engine)
    hf_accel.unpatch(model)


def test_the_device_thread_ends_with_its_engine(make_engine):
    before = set(device_threads())
    engine = make_engine()
    request = engine.add_request(ids_of(1, 9), greedy(6))
    engine.step()
    [thread] = set(device_threads()) - before
    engine.shutdown()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="shut down"):
        engine.result(request)
    engine = make_engine()
    engine.add_request(ids_of(1, 9), greedy(6))
    engine.step()  # and nobody asks for the result
    [thread] = set(device_threads()) - before
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive() and thread not in threading.enumerate()
