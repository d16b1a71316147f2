"""On CUDA: decode steps replayed from real graphs give HF's tokens, wait for nothing on the host, and survive what cannot be
captured."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_accel import Engine, SamplingParams

from ...patching.configs import make_model
from .test_cuda_graph_runner import Waiting
from .test_graph_engine import hf_tokens, make_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

CONFIG: dict[str, Any] = {"num_pages": 128, "max_num_seqs": 9, "cuda_graphs": True, "attention_backend": "triton"}
NEW_TOKENS = 40
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


@contextlib.contextmanager
def syncs_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steady_steps(engine: Engine, prompts: list[torch.Tensor]) -> list[list[int]]:
    """The tokens of requests that all run at once, with whole steps in the middle, planning and sampling too, that must not wait
    for the device in any way that torch can see."""
    ids = [engine.add_request(input_ids=prompt, params=GREEDY) for prompt in prompts]
    for _ in range(12):
        engine.step()
    with syncs_forbidden():
        for _ in range(20):
            engine.step()
    return [engine.result(i).outputs[0].token_ids for i in ids]


def make(family: str) -> tuple[Any, list[torch.Tensor], list[list[int]]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(family, torch.float32).cuda()
    prompts = make_prompts(5, seed=31)
    return model, prompts, [hf_tokens(model, prompt.cuda(), NEW_TOKENS) for prompt in prompts]


def tokens(engine: Engine, prompts: list[torch.Tensor]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("fused", [True, False], ids=["own-loop", "layers"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_replayed_steps_give_hfs_tokens_and_do_not_sync(family: str, fused: bool) -> None:
    if fused and family != "llama":
        pytest.skip("it has no loop of our own")
    model, prompts, expected = make(family)
    engine = Engine(model, **CONFIG, overlap=True, fused=fused)
    assert steady_steps(engine, prompts) == expected
    stats = engine.stats()
    assert stats.num_cuda_graphs >= 1 and stats.num_graph_replays >= NEW_TOKENS - 10
    assert stats.cuda_graph_bytes > 0


def test_eager_steps_do_not_sync_either() -> None:
    model, prompts, expected = make("llama")
    engine = Engine(model, **CONFIG | {"cuda_graphs": False}, overlap=True)
    assert steady_steps(engine, prompts) == expected


def test_without_overlap_only_the_sampled_ids_are_waited_for() -> None:
    model, prompts, expected = make("llama")
    engine = Engine(model, **CONFIG, overlap=False)
    runner, forward = engine.core.executor.runner, engine.core.executor.runner.forward
    steps = itertools.count()

    def strict(batch: Any) -> torch.Tensor:
        with syncs_forbidden() if next(steps) >= 12 else contextlib.nullcontext():
            return forward(batch)

    runner.forward = strict
    assert tokens(engine, prompts) == expected
    assert next(steps) > 30 and engine.stats().num_graph_replays > 30


def test_graphs_follow_weights_in_place_and_replaced() -> None:
    model, prompts, expected = make("llama")
    engine = Engine(model, **CONFIG)
    engine.warmup()
    captures = engine.core.executor.runner.graphs.num_captures
    assert captures == 5 and tokens(engine, prompts) == expected
    with torch.no_grad():
        model.lm_head.weight.neg_()
    in_place = tokens(engine, prompts)
    assert in_place == [hf_tokens(copy.deepcopy(model), prompt.cuda(), NEW_TOKENS) for prompt in prompts] != expected
    assert engine.core.executor.runner.graphs.num_captures == captures
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)
    assert tokens(engine, prompts) == expected
    engine.sleep()
    assert engine.stats().num_cuda_graphs == 0
    assert tokens(engine, prompts) == expected
    assert engine.core.executor.runner.graphs.num_captures > captures


def test_a_forward_that_syncs_runs_eagerly_and_random_numbers_still_work() -> None:
    model, prompts, expected = make("llama")
    model.model.norm = Waiting(model.model.norm)
    engine = Engine(model, **CONFIG)
    assert tokens(engine, prompts) == expected
    assert engine.stats().num_cuda_graphs == 0
    assert torch.rand(8, device="cuda").unique().numel() == 8


def test_a_capture_that_the_driver_refuses() -> None:
    """The watch is blind to it: the allocator and the random numbers must be in order afterwards."""
    model, prompts, expected = make("llama")
    forward = type(model.lm_head).forward

    class Sneaky(type(model.lm_head)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.cuda.current_stream().synchronize()
            return forward(self, x)

    model.lm_head.__class__ = Sneaky
    engine = Engine(model, **CONFIG)
    for _ in range(2):
        assert tokens(engine, prompts) == expected
    assert engine.stats().num_cuda_graphs == 0
    assert torch.rand(8, device="cuda").unique().numel() == 8
    torch.cuda.empty_cache()
