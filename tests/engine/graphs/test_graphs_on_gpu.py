"""On CUDA: decode steps replayed from real graphs give HF's tokens, wait for nothing on the host, and survive what cannot be
captured."""

from __future__ import annotations

import copy
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


class SyncsForbidden:
    """From its `after`-th step on, everything of a decode step up to its logits must not wait for the device."""

    def __init__(self, engine: Engine, after: int) -> None:
        executor = engine.core.executor
        self.after, self.num_steps = after, 0
        self._build, self._forward = executor.builder.build, executor.runner.forward
        executor.builder.build = lambda output: self._strictly(self._build, output)
        executor.runner.forward = lambda batch: self._strictly(self._forward, batch)

    def _strictly(self, call: Any, argument: Any) -> Any:
        requests = getattr(argument, "requests", None)
        self.num_steps += requests is not None
        if self.num_steps <= self.after:
            return call(argument)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(argument)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def make(family: str) -> tuple[Any, list[torch.Tensor], list[list[int]]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(family, torch.float32).cuda()
    prompts = make_prompts(5, seed=31)
    return model, prompts, [hf_tokens(model, prompt.cuda(), NEW_TOKENS) for prompt in prompts]


def tokens(engine: Engine, prompts: list[torch.Tensor]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_replayed_steps_give_hfs_tokens_and_do_not_sync(family: str) -> None:
    model, prompts, expected = make(family)
    engine = Engine(model, **CONFIG)
    strict = SyncsForbidden(engine, after=12)
    assert tokens(engine, prompts) == expected
    stats = engine.stats()
    assert stats.num_cuda_graphs >= 1 and stats.num_graph_replays >= NEW_TOKENS - 10
    assert stats.cuda_graph_bytes > 0 and strict.num_steps > 30


def test_eager_steps_do_not_sync_either() -> None:
    model, prompts, expected = make("llama")
    engine = Engine(model, **CONFIG | {"cuda_graphs": False})
    SyncsForbidden(engine, after=12)
    assert tokens(engine, prompts) == expected


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
