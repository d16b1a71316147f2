"""The last, partial page of a prefix is shared by copy: how many tokens the cache serves, and that they are the right ones."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection

from .hf_answers import greedy, hf_greedy, ids_of

CHECKED = FaultInjection(check_integrity=True)


@pytest.fixture(
    params=[{}, {"fused": False, "overlap": True}, {"fused": False, "attention_backend": "torch"}],
    ids=["fused", "cpu-overlap", "torch"],
)
def engine(model, request, assert_idle):
    engine = Engine(model, num_pages=64, page_size=16, faults=CHECKED, **request.param)
    yield engine
    assert_idle(engine)


class Copies:
    """Counts what an engine copies, and can do something at each copy."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, then: Any = None) -> None:
        self.made: list[tuple[int, int]] = []
        executor = engine.core.executor
        copy_pages = executor.copy_pages

        def counted(page_copies):
            self.made += page_copies
            copy_pages(page_copies)
            if then is not None:
                then()

        monkeypatch.setattr(executor, "copy_pages", counted)


@pytest.mark.parametrize("length", [2, 5, 15, 16, 17, 33, 48])
def test_the_same_prompt_again(engine, model, length):
    ids = ids_of(length, length)
    expected = hf_greedy(model, ids, 6)
    for num_cached in (0, length - 1, length - 1):
        [output] = engine.generate([ids], greedy(6))
        assert (output.num_cached_tokens, output.outputs[0].token_ids) == (num_cached, expected)


@pytest.mark.parametrize(("common", "length"), [(1, 9), (7, 9), (17, 40), (31, 40)])
def test_prompts_that_part_within_a_page(engine, model, common, length):
    first, second = ids_of(1, length), ids_of(1, common) + [(t + 1) % 256 for t in ids_of(1, length)[common:]]
    for ids, num_cached in ((first, 0), (second, common), (first, length - 1)):
        [output] = engine.generate([ids], greedy(5))
        assert (output.num_cached_tokens, output.outputs[0].token_ids) == (num_cached, hf_greedy(model, ids, 5))


def test_chat_in_turns(engine, model):
    history: list[int] = []
    for turn in range(5):
        num_before = max(0, len(history) - 1)  # the last token of an answer was never computed
        history = history + ids_of(turn, 11 + turn)
        [output] = engine.generate([history], greedy(9))
        assert output.num_cached_tokens == num_before
        assert output.outputs[0].token_ids == hf_greedy(model, history, 9)
        history += output.outputs[0].token_ids


@pytest.mark.parametrize("length", [6, 16, 40])
def test_samples_of_one_prompt(engine, model, monkeypatch, length):
    ids = ids_of(3, length)
    copies = Copies(engine, monkeypatch)
    [output] = engine.generate([ids], greedy(12, n=8))
    assert [o.token_ids for o in output.outputs] == [hf_greedy(model, ids, 12)] * 8
    assert engine.stats().num_cached_tokens == 7 * (length - 1)
    assert len(copies.made) == 7 and len({source for source, _ in copies.made}) == 1


def test_samples_join_one_that_is_writing_into_its_last_page(engine, model, monkeypatch):
    ids = ids_of(4, 20)
    copies = Copies(engine, monkeypatch)
    first = engine.add_request(ids, greedy(9))
    for _ in range(4):
        engine.step()
    later = [engine.add_request(ids, greedy(9)) for _ in range(2)]
    outputs = [engine.result(i) for i in (first, *later)]
    assert [o.num_cached_tokens for o in outputs] == [0, 19, 19] and len(copies.made) == 2
    assert all(o.outputs[0].token_ids == hf_greedy(model, ids, 9) for o in outputs)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("num_pages", [6, 64])
def test_retraction_and_a_tiny_pool(model, monkeypatch, assert_idle, every, num_pages):
    faults = FaultInjection(retract_every=every, check_integrity=True)
    engine = Engine(model, num_pages=num_pages, page_size=8, faults=faults)
    copies = Copies(engine, monkeypatch)
    shared = ids_of(5, 13)
    prompts = [shared, shared + [7], shared[:10] + [9, 9], ids_of(6, 5), shared[:3], shared]
    for _ in range(2):
        outputs = engine.generate(prompts, greedy(14))
        assert [o.outputs[0].token_ids for o in outputs] == [hf_greedy(model, ids, 14) for ids in prompts]
    assert engine.stats().num_retractions > 5 and len(copies.made) > 5
    assert_idle(engine)


@pytest.mark.parametrize("options", [{"faults": FaultInjection(force_miss=True)}, {"enable_prefix_cache": False}])
def test_no_cache_no_copies(model, monkeypatch, options):
    engine = Engine(model, num_pages=64, page_size=16, **options)
    copies = Copies(engine, monkeypatch)
    for _ in range(2):
        [output] = engine.generate([ids_of(3, 20)], greedy(4, n=3))
        assert output.num_cached_tokens == 0 and output.outputs[0].token_ids == hf_greedy(model, ids_of(3, 20), 4)
    assert not copies.made


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_batch_mate_repeats_no_copy(model, monkeypatch, assert_idle, overlap):
    engine = Engine(model, num_pages=64, page_size=16, faults=CHECKED, overlap=overlap)
    ids = ids_of(7, 21)
    expected = hf_greedy(model, ids, 8)
    engine.generate([ids], greedy(8))
    copies = Copies(engine, monkeypatch)
    forward, calls = engine.core.executor.runner.forward, []

    def poisoned(batch):
        calls.append(len(batch.query_lens_cpu))
        if (batch.input_ids == 255).any():
            raise ZeroDivisionError("marked token")
        return forward(batch)

    monkeypatch.setattr(engine.core.executor.runner, "forward", poisoned)
    outputs = engine.generate([ids, [*ids[:18], 255, 3], ids], greedy(8))
    assert calls[overlap:][:4] == [3, 1, 1, 1]  # the batch (again, not launched ahead), then each alone
    assert isinstance(outputs.pop(1).error, ZeroDivisionError)
    assert [(o.num_cached_tokens, o.outputs[0].token_ids) for o in outputs] == [(20, expected)] * 2
    assert len(copies.made) == 3
    num_cached = engine.stats().num_pages_cached
    [output] = engine.generate([[*ids[:18], 254, 3]], greedy(1))
    assert output.num_cached_tokens == 18  # from the others: the failed one left nothing
    assert engine.stats().num_pages_cached == num_cached + 1
    assert_idle(engine)


@pytest.mark.parametrize(
    ("where", "overlap"), [("build", False), ("execute", False), ("build", True), ("launch", True)]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_step_that_breaks_after_its_copies_is_run_again_without_them(
    model, monkeypatch, assert_idle, where, overlap, error
):
    engine = Engine(model, num_pages=64, page_size=16, faults=CHECKED, overlap=overlap)
    ids = ids_of(8, 21)
    engine.generate([ids], greedy(8))
    copies = Copies(engine, monkeypatch)
    executor, broken = engine.core.executor, []
    step_part = getattr(executor, where)

    def breaks_once(*args):
        if not broken:
            broken.append(True)
            raise error
        return step_part(*args)

    monkeypatch.setattr(executor, where, breaks_once)
    requests = [engine.add_request(prompt, greedy(8)) for prompt in (ids, ids[:19] + [1, 2])]
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    else:
        engine.step()
    assert len(copies.made) == 2
    outputs = [engine.result(i) for i in requests]
    assert [o.outputs[0].token_ids for o in outputs] == [hf_greedy(model, p, 8) for p in (ids, ids[:19] + [1, 2])]
    assert [o.num_cached_tokens for o in outputs] == [20, 19] and len(copies.made) == 2
    assert_idle(engine)


def test_ctrl_c_during_the_copies_waits_for_their_end(model, monkeypatch, assert_idle):
    engine = Engine(model, num_pages=64, page_size=16, faults=CHECKED)
    ids = ids_of(9, 21)
    engine.generate([ids], greedy(8))
    copies = Copies(engine, monkeypatch, then=lambda: os.kill(os.getpid(), signal.SIGINT))
    request = engine.add_request(ids, greedy(8))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    finally:
        signal.signal(signal.SIGINT, previous)
    output = engine.result(request)
    assert (output.num_cached_tokens, output.outputs[0].token_ids) == (20, hf_greedy(model, ids, 8))
    assert len(copies.made) == 1
    assert_idle(engine)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_copies_that_fail_make_nobody_believe_in_them(model, monkeypatch, assert_idle, error):
    engine = Engine(model, num_pages=64, page_size=16, faults=CHECKED)
    ids = ids_of(10, 21)
    running = engine.add_request(ids_of(11, 9), greedy(20))
    doomed = engine.add_request(ids_of(12, 9), SamplingParams(temperature=0, max_tokens=400))
    engine.generate([ids], greedy(8))
    copies = Copies(engine, monkeypatch)
    pool = engine.core.executor.runner.pool

    def fails(page_copies):
        for pages in (*pool.k_pages, *pool.v_pages):
            pages.fill_(1e4)  # half done, say
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pool, "copy_pages", fails)
        request = engine.add_request(ids, greedy(8))
        with pytest.raises(error):
            engine.step()
    assert engine.stats().num_pages_free == 64 and engine.stats().num_waiting == 3
    engine.abort(doomed)
    assert len(copies.made) == 1
    outputs = [engine.result(request), engine.result(running)]
    assert outputs[0].outputs[0].token_ids == hf_greedy(model, ids, 8)
    assert outputs[1].outputs[0].token_ids == hf_greedy(model, ids_of(11, 9), 20)
    engine.result(doomed)
    assert_idle(engine)
