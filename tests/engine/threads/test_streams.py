"""Streams beside other callers: readers that stop, are cancelled, or read while somebody else drives."""

from __future__ import annotations

import asyncio
import time

import pytest

import hf_accel
from hf_accel import SamplingParams

from .callers import mixed_jobs, prompt, run_together


def test_a_stream_whose_reader_stops(model, assert_idle):
    engine = hf_accel.get_engine(model)
    jobs = mixed_jobs(model)
    solo = [job() for job in jobs]
    abandoned = []

    def stop_reading():
        stream = engine.stream(prompt(22, 10)[0], SamplingParams(temperature=0, max_tokens=300))
        abandoned.append(stream)
        return [next(stream).token_ids for _ in range(3)]

    results = run_together([stop_reading, *jobs])
    assert len(results[0]) == 3
    assert results[1:] == solo
    abandoned.pop().close()
    assert_idle(engine)


def test_a_stream_dropped_without_closing_is_aborted(model, assert_idle):
    engine = hf_accel.get_engine(model)
    stream = engine.stream(prompt(22, 10)[0], SamplingParams(temperature=0, max_tokens=300))
    next(stream)
    assert engine.stats().num_running == 1
    del stream
    assert_idle(engine)


def test_chunks_are_complete_when_another_thread_drives(model, assert_idle):
    engine = hf_accel.get_engine(model)
    params = SamplingParams(temperature=0, max_tokens=30, n=2)
    expected = [o.token_ids for o in engine.generate([prompt(23, 10)[0]], params)[0].outputs]

    def read():
        found: list[list[int]] = [[], []]
        for chunk in engine.stream(prompt(23, 10)[0], params):
            found[chunk.index] += chunk.token_ids
            time.sleep(0.0005)  # the others step on meanwhile
        return found

    for _ in range(3):
        assert run_together([read] * 8) == [expected] * 8
    assert_idle(engine)


def test_many_async_readers_and_one_that_is_cancelled(model, assert_idle):
    engine = hf_accel.get_engine(model)
    params = [SamplingParams(temperature=0.8, seed=s, max_tokens=25) for s in range(12)]
    expected = [engine.generate([prompt(s, 10)[0]], params[s])[0].outputs[0].token_ids for s in range(12)]

    async def read(s: int) -> list[int]:
        return [t async for chunk in engine.astream(prompt(s, 10)[0], params[s]) for t in chunk.token_ids]

    async def leave_early() -> None:
        async for _ in engine.astream(prompt(30, 10)[0], SamplingParams(temperature=0, max_tokens=400)):
            pass

    async def main() -> list[list[int]]:
        leaving = asyncio.create_task(leave_early())
        reading = [asyncio.create_task(read(s)) for s in range(12)]
        await asyncio.sleep(0.02)
        leaving.cancel()
        results = await asyncio.gather(*reading)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return results

    assert asyncio.run(main()) == expected
    assert_idle(engine, patience=10)


def test_the_event_loop_stays_free(model, batch_sizes):
    engine = hf_accel.get_engine(model)

    async def main() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        stream = engine.astream(prompt(1, 10)[0], SamplingParams(temperature=0, max_tokens=60))
        tokens = [t async for chunk in stream for t in chunk.token_ids]
        ticker.cancel()
        assert len(tokens) == 60
        return ticks

    assert asyncio.run(main()) > 20
