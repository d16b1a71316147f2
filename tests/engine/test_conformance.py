"""Greedy tokens are HF's whatever the engine does meanwhile: pages, chunks, policies, retraction, prefix hits, aborts.

The grid is sampled so that every pair of choices occurs together; every invariant is checked after every step.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection
from hf_accel_kernels.cpu import library

from ..patching.configs import VOCAB_SIZE, left_padded, make_model

NEW_TOKENS = 16
LONGEST = 56  # tokens of the longest prompt and its output
AXES: dict[str, Sequence[Any]] = {
    "family": ("llama", "mistral"),
    "path": ("fused", "cpu", "torch", "device"),
    "page_size": (1, 3, 16),
    "budget": (7, 64),
    "policy": ("fcfs", "lpm", "priority"),
    "pool": ("roomy", "tiny"),
    "faults": ("none", "retract", "miss", "no_cache"),
    "seqs": (2, 16),
    "overlap": (False, True),
}
PATHS: dict[str, dict[str, Any]] = {
    "fused": {},
    "cpu": {"fused": False, "attention_backend": "cpu"},
    "torch": {"fused": False, "attention_backend": "torch", "pack_weights": False},
    "device": {"attention_backend": "torch"},
}
FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "retract": {"retract_every": 3},
    "miss": {"force_miss": True},
    "no_cache": {},
}


def pairwise(axes: dict[str, Sequence[Any]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Points of the grid such that each pair of values of two axes occurs in one: greedily, the best of random points."""
    random_ = random.Random(seed)
    names = list(axes)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x, y in itertools.product(axes[a], axes[b])
    }
    while missing:
        (a, x), (b, y) = min(missing, key=repr)
        points = []
        for _ in range(60):
            point = {name: random_.choice(axes[name]) for name in names} | {a: x, b: y}
            points.append((point, set(itertools.combinations(point.items(), 2)) & missing))
        best, covered = max(points, key=lambda candidate: len(candidate[1]))
        missing -= covered
        yield best


GRID = list(pairwise(AXES))


def grid_id(point: dict[str, Any]) -> str:
    return "-".join(str(value) for value in point.values())


def engine_options(point: dict[str, Any]) -> dict[str, Any]:
    if point["path"] in ("fused", "cpu") and library.load()[0] is None:
        pytest.skip(f"no C++ ops here: {library.load()[1]}")
    tokens = 64 if point["pool"] == "tiny" else 1200
    return {
        "page_size": point["page_size"],
        "num_pages": -(-tokens // point["page_size"]),
        "max_num_batched_tokens": point["budget"],
        "max_num_seqs": point["seqs"],
        "policy": point["policy"],
        "enable_prefix_cache": point["faults"] != "no_cache",
        "overlap": point["overlap"],
        "faults": FaultInjection(
            check_integrity=True, device_forward=point["path"] == "device", **FAULTS[point["faults"]]
        ),
        **PATHS[point["path"]],
    }


def make_prompts() -> list[list[int]]:
    """Mixed lengths: alone, sharing prefixes of 20 and 33 tokens, one the start of another, one twice."""
    shared = left_padded([33], seed=3)[0][0].tolist()
    tails = [left_padded([n], seed=10 + n)[0][0].tolist() for n in (1, 2, 5, 7)]
    alone = [left_padded([n], seed=30 + n)[0][0].tolist() for n in (1, 3, 16, 27, LONGEST - NEW_TOKENS)]
    return [*alone, *(shared[:20] + t for t in tails), shared[:20], shared, shared + tails[3], alone[3]]


PROMPTS = make_prompts()
ABORTED = 7  # index of the prompt whose request is aborted


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[PreTrainedModel, list[list[int]]]]:
    """Each family's model and HF's continuation of each prompt, one by one."""
    found = {}
    for family in AXES["family"]:
        model = make_model(family)
        found[family] = (model, [hf_continuation(model, prompt) for prompt in PROMPTS])
    return found


def hf_continuation(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


def test_the_grid_covers_every_pair() -> None:
    covered = {pair for point in GRID for pair in itertools.combinations(point.items(), 2)}
    for a, b in itertools.combinations(AXES, 2):
        assert {((a, x), (b, y)) for x in AXES[a] for y in AXES[b]} <= covered
    assert len(GRID) <= 24, "the grid has grown: keep the file fast"


@pytest.mark.parametrize("point", GRID, ids=grid_id)
def test_engine(point: dict[str, Any], references: dict[str, tuple[PreTrainedModel, list[list[int]]]]) -> None:
    """Requests arrive in waves, with n up to 3 and lengths of their own; one is aborted; then all come again at once."""
    model, expected = references[point["family"]]
    engine = Engine(model, **engine_options(point))
    runs_fused = engine.core.executor.runner
    order = random.Random(grid_id(point))
    lengths = [order.randint(1, NEW_TOKENS) for _ in PROMPTS]
    lengths[ABORTED] = NEW_TOKENS
    finished = run_in_waves(engine, order, lengths)
    assert runs_fused.fused is (point["path"] in ("fused", "device"))
    for index, output in finished.items():
        for completion in output.outputs:
            if index == ABORTED:
                assert completion.finish_reason == "abort" and len(completion.token_ids) < NEW_TOKENS
            else:
                assert completion.finish_reason == "length" and len(completion.token_ids) == lengths[index]
            assert completion.token_ids == expected[index][: len(completion.token_ids)], f"prompt {index}"
    again = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS))
    assert [o.outputs[0].token_ids for o in again] == expected
    check_what_happened(point, engine)
    engine.shutdown()


def run_in_waves(engine: Engine, order: random.Random, lengths: list[int]) -> dict[int, hf_accel.RequestOutput]:
    """Add requests between steps, abort one after its first token; returns the output of each prompt."""
    waiting = list(range(len(PROMPTS)))
    order.shuffle(waiting)
    index_of: dict[int, int] = {}
    finished: dict[int, hf_accel.RequestOutput] = {}
    aborted = False
    while waiting or engine.has_unfinished_requests:
        for _ in range(min(len(waiting), order.choice((0, 0, 1, 4)))):
            index = waiting.pop()
            n = 1 if index == ABORTED else order.choice((1, 1, 3))
            params = SamplingParams(temperature=0.0, max_tokens=lengths[index], n=n)
            request = engine.add_request(input_ids=PROMPTS[index], params=params, priority=order.randint(0, 2))
            index_of[request] = index
        for output in engine.step():
            finished[index_of[output.request_id]] = output
        victim = next((r for r, i in index_of.items() if i == ABORTED), None)
        if not aborted and victim is not None and engine._groups[victim].output.outputs[0].token_ids:
            engine.abort(victim)
            aborted = True
    assert aborted and len(finished) == len(PROMPTS)
    return finished


def check_what_happened(point: dict[str, Any], engine: Engine) -> None:
    """The rare path that the point is about was taken, and nothing is left behind."""
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_pages_free + stats.num_pages_cached == stats.num_pages_total
    engine.check_integrity()
    if point["faults"] == "retract":
        assert stats.num_retractions > 3
    if point["faults"] in ("miss", "no_cache"):
        assert stats.num_cached_tokens == 0
    elif point["pool"] == "roomy":
        assert stats.num_cached_tokens > 200


@pytest.mark.parametrize("point", GRID, ids=grid_id)
def test_patched_generate(
    point: dict[str, Any], references: dict[str, tuple[PreTrainedModel, list[list[int]]]]
) -> None:
    """A padded batch natively, and one through HF's processors, on the same grid; the second call on a warm cache."""
    model, expected = references[point["family"]]
    chosen = [1, 3, 6, 9, 11]
    width = max(len(PROMPTS[i]) for i in chosen)
    input_ids, mask = left_padded([len(PROMPTS[i]) for i in chosen])
    for row, i in enumerate(chosen):
        input_ids[row, width - len(PROMPTS[i]) :] = torch.tensor(PROMPTS[i])
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    few = {"repetition_penalty": 1.4, "max_new_tokens": 6}  # few, so that all rows fit in most pools
    penalised = model.generate(input_ids[:2], **{**options, "attention_mask": mask[:2]}, **few)
    with hf_accel.patch(model, **engine_options(point)):
        for _ in range(2):
            got = model.generate(input_ids, max_new_tokens=NEW_TOKENS, **options)
            assert got[:, width:].tolist() == [expected[i] for i in chosen]
            assert torch.equal(
                model.generate(input_ids[:2], **{**options, "attention_mask": mask[:2]}, **few), penalised
            )
        engine = hf_accel.get_engine(model)
        assert engine.stats().fallback_reasons == {}
        engine.check_integrity()


def test_ids_of_the_prompts_are_in_the_vocabulary() -> None:
    assert max(map(max, PROMPTS)) < VOCAB_SIZE and max(map(len, PROMPTS)) + NEW_TOKENS <= LONGEST
