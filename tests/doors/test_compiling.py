"""Compiling is nobody else's business: not the engine's lock, not the event loop, not other requests; and it is done once."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import weakref

import pytest

from hf_accel import Engine, SamplingParams
from hf_accel.structured.compiler import ConstraintCompiler, compiler_for
from hf_accel.structured.syntax import StructureError

FREE = SamplingParams(temperature=0, max_tokens=6)
WAIT = 60


class Slow:
    """Compilations of "slow" patterns begin, and then wait to be released."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        self.compiled: list[str] = []


@pytest.fixture
def slow(monkeypatch):
    state, real = Slow(), ConstraintCompiler._compile

    def compile(self, constraint):
        state.compiled.append(constraint.value)
        if "slow" in constraint.value:
            state.begun.set()
            assert state.released.wait(WAIT)
        return real(self, constraint)

    monkeypatch.setattr(ConstraintCompiler, "_compile", compile)
    yield state
    state.released.set()


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer, num_pages=128, page_size=8)


def in_thread(function) -> tuple[threading.Thread, list]:
    results: list = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def pattern(name: str) -> SamplingParams:
    return SamplingParams(regex=name, temperature=0, max_tokens=20)


@pytest.mark.parametrize("call", ["add_request", "generate", "stream"])
def test_others_decode_while_one_compiles(engine, slow, call):
    params = pattern(f"slow (red|blue) {call}")
    work = {
        "add_request": lambda: engine.result(engine.add_request([5, 6], params)).outputs[0].text,
        "generate": lambda: engine.generate([[5, 6]], params)[0].outputs[0].text,
        "stream": lambda: "".join(chunk.text for chunk in engine.stream([5, 6], params)),
    }[call]
    thread, results = in_thread(work)
    assert slow.begun.wait(WAIT)
    before = engine.stats().num_generated_tokens
    assert engine.core.lock.acquire(timeout=WAIT)
    engine.core.lock.release()
    assert len(engine.generate([[7, 8], [9]], FREE)) == 2
    assert sum(1 for _ in engine.stream([3, 4], FREE))
    assert engine.stats().num_generated_tokens > before
    assert not results and thread.is_alive()
    slow.released.set()
    thread.join(WAIT)
    assert re.fullmatch(f"slow (red|blue) {call}", results[0])


def test_the_event_loop_is_free_while_a_stream_compiles(engine, slow):
    async def main() -> tuple[str, int, str]:
        async def collect(params) -> str:
            return "".join([chunk.text async for chunk in engine.astream([5, 6], params)])

        task = asyncio.create_task(collect(pattern("slow [ab]{3}")))
        while not slow.begun.is_set():
            await asyncio.sleep(0)
        ticks = 0
        other = asyncio.create_task(collect(FREE))
        while not other.done():
            ticks += 1
            await asyncio.sleep(0.001)
        assert not task.done()
        slow.released.set()
        return await task, ticks, await other

    text, ticks, other = asyncio.run(asyncio.wait_for(main(), WAIT))
    assert re.fullmatch("slow [ab]{3}", text) and ticks and other


def test_one_compilation_for_all_who_ask_at_once(model, tokenizer, slow):
    """Through two engines on one tokenizer, before either has compiled anything."""
    engines = [Engine(model, tokenizer, num_pages=64, page_size=8) for _ in range(2)]
    work = [lambda e=e: e.generate([[5, 6]], pattern("slow once [ab]"))[0].outputs[0].text for e in engines * 4]
    running = [in_thread(function) for function in work]
    assert slow.begun.wait(WAIT)
    slow.released.set()
    for thread, results in running:
        thread.join(WAIT)
        assert re.fullmatch("slow once [ab]", results[0])
    assert slow.compiled == ["slow once [ab]"]


def test_a_failure_is_its_requests_alone_and_is_tried_again(engine, slow):
    names = ["(a|b)x", "slow(?=no)", "[cd]y", "slow(?=no)", "(e)z"]
    running = [in_thread(lambda n=n: engine.generate([[5, 6]], pattern(n))[0].outputs[0].text) for n in names]
    slow.released.set()
    for (thread, results), name in zip(running, names, strict=True):
        thread.join(WAIT)
        if "slow" in name:
            assert isinstance(results[0], StructureError) and "lookahead" in str(results[0])
        else:
            assert re.fullmatch(name, results[0])
    assert not engine.has_unfinished_requests and not engine.core.requests
    engine.check_integrity()
    with pytest.raises(StructureError, match="lookahead"):
        engine.add_request([5, 6], pattern("slow(?=no)"))


def test_a_batch_of_different_constraints_compiles_each_once(engine, slow):
    names = [f"{i}(a|b)" for i in range(6)] * 2
    outputs = engine.generate([[5, 6]] * 12, [pattern(n) for n in names])
    assert all(re.fullmatch(n, o.outputs[0].text) for n, o in zip(names, outputs, strict=True))
    assert sorted(slow.compiled) == sorted(set(names))
    engine.generate([[5, 6]] * 12, [pattern(n) for n in names])
    assert len(slow.compiled) == 6


def test_a_compiler_goes_with_its_tokenizer(tokenizer):
    class Wrapped:
        """A tokenizer in another's clothes."""

        def __init__(self) -> None:
            self.backend_tokenizer, self.all_special_ids = tokenizer.backend_tokenizer, tokenizer.all_special_ids

        def __len__(self) -> int:
            return len(tokenizer)

    class Unhashable(Wrapped):
        __hash__ = None

    assert compiler_for(tokenizer, [1]) is compiler_for(tokenizer, [1, 1], 5000)
    assert compiler_for(tokenizer, [1]) is not compiler_for(tokenizer, [1, 2])
    assert compiler_for(tokenizer, [1], 3000).vocabulary.size == 3000
    assert compiler_for(tokenizer, [1, 4099]).vocabulary.size == 4100
    with pytest.raises(StructureError, match="end of sequence"):
        compiler_for(tokenizer, [4099], 4096)
    mine = Wrapped()
    gone = weakref.ref(compiler_for(mine, [1]))
    assert compiler_for(mine, [1]) is gone()
    assert compiler_for(Unhashable(), [1]).vocabulary.digest == gone().vocabulary.digest
    del mine
    gc.collect()
    assert gone() is None


def test_a_refusal_keeps_nothing_alive(model, tokenizer):
    engine = Engine(model, tokenizer, num_pages=64, page_size=8)
    for _ in range(2):
        with pytest.raises(StructureError, match="lookahead"):
            engine.generate([[5, 6]], pattern("a(?=b)"))
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
