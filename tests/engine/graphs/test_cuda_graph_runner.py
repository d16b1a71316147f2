"""Which sizes get a graph and when; failures and limits leave the engine working, with one log line that says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from hf_accel import Engine, SamplingParams
from hf_accel.engine import graph_setup
from hf_accel.engine.cuda_graph import batch_sizes
from hf_accel.engine.graph_capture import HostSyncWatch

from ...patching.configs import make_model
from ...tiny import make_tiny_llama
from .recording import BYTES_PER_GRAPH
from .test_graph_engine import NEW_TOKENS, hf_tokens, make_prompts, spread_llama, tokens


def warnings_of(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= level and "CUDA graphs" in r.getMessage()]


def test_the_default_table() -> None:
    assert batch_sizes(1) == (1,) and batch_sizes(3) == (1, 2, 3) and batch_sizes(24) == (1, 2, 4, 8, 16, 24)
    table = batch_sizes(600)
    assert table[-1] == 600 and list(table) == sorted(set(table)) and {256, 272, 512, 544, 576} <= set(table)
    for size in range(1, 601):
        chosen = min(n for n in table if n >= size)
        assert chosen - size < max(8, size // 8)


def test_a_size_gets_its_graph_after_some_steps_and_larger_ones_serve_till_then(
    recorded: dict[str, Any], graphs_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_setup, "PATIENCE", 3)
    model, prompts = spread_llama(), make_prompts(6, seed=11)
    engine = Engine(model, **recorded, cuda_graph_batch_sizes=(1, 2, 4, 6), enable_prefix_cache=False)
    graphs = graphs_of(engine)
    params = SamplingParams(temperature=0, max_tokens=4)  # three decode steps
    engine.generate(prompts, params)
    assert (graphs.num_graphs, graphs.num_replays) == (0, 0)
    engine.generate(prompts, params)  # the fourth decode step captures
    assert (list(graphs._graphs), graphs.num_replays) == ([6], 3)
    engine.generate(prompts[:3], params)  # the graph of six serves three
    assert (list(graphs._graphs), graphs.num_replays) == ([6], 6)
    engine.generate(prompts[:2], params)  # but not two
    assert (list(graphs._graphs), graphs.num_replays) == ([6], 6)
    assert tokens(engine, prompts[:3]) == [hf_tokens(model, prompt) for prompt in prompts[:3]]
    assert sorted(graphs._graphs) == [4, 6]


def test_memory_is_bounded(recorded: dict[str, Any], graphs_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = spread_llama(), make_prompts(7, seed=12)
    engine = Engine(model, **recorded, enable_prefix_cache=False)
    graphs = graphs_of(engine)
    graphs._most_bytes = 2 * BYTES_PER_GRAPH
    with caplog.at_level(logging.INFO, "hf_accel"):
        for count in (4, 1, 2, 7, 3):
            assert tokens(engine, prompts[:count]) == [hf_tokens(model, prompt) for prompt in prompts[:count]]
    assert sorted(graphs._graphs) == [1, 4]
    assert graphs.num_replays == 4 * (NEW_TOKENS - 1)  # 4, 1, 2 in the graph of 4, and 3; not 7
    (line,) = warnings_of(caplog)
    assert "captures no more" in line and "batch sizes captured: 1, 4" in line


@pytest.mark.parametrize(
    ("error", "told", "kept"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "RuntimeError: operation not permitted", 0),
        (torch.OutOfMemoryError("no"), "no memory left for them (batch sizes captured: 1)", 1),
    ],
    ids=["invalid", "out-of-memory"],
)
def test_a_failed_capture_leaves_the_engine_working(
    error: Exception, told: str, kept: int, recorded: dict[str, Any], graphs_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompts = spread_llama(), make_prompts(2, seed=13)
    expected = [hf_tokens(model, prompt) for prompt in prompts]
    engine = Engine(model, **recorded)
    graphs = graphs_of(engine)
    assert tokens(engine, prompts[:1]) == expected[:1] and graphs.num_graphs == 1
    graphs._maker.fail = type(error)(*error.args)  # the parameter lives on, and what is raised holds the engine
    with caplog.at_level(logging.INFO, "hf_accel"):
        assert tokens(engine, prompts) == expected
        assert tokens(engine, prompts) == expected
    assert graphs.num_graphs == kept
    (line,) = warnings_of(caplog, logging.WARNING)
    assert told in line
    graphs._maker.fail = None
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # another chance
    assert tokens(engine, prompts) == expected and graphs.num_graphs == 1


def test_an_interrupted_capture_counts_for_nothing(recorded: dict[str, Any], graphs_of: Any) -> None:
    model, prompts = spread_llama(), make_prompts(2, seed=14)
    engine = Engine(model, **recorded)
    graphs = graphs_of(engine)
    graphs._maker.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokens(engine, prompts)
    graphs._maker.fail = None
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs.num_graphs == 1


class Waiting(nn.Module):
    """A norm that looks at its input on the host."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if x.abs().max() > 0 else x


def test_a_forward_that_waits_for_the_device(
    recorded: dict[str, Any], graphs_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompts = spread_llama(), make_prompts(2, seed=15)
    model.model.norm = Waiting(model.model.norm)
    engine = Engine(model, **recorded)
    with caplog.at_level(logging.INFO, "hf_accel"):
        for _ in range(2):
            assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs_of(engine).num_graphs == graphs_of(engine).num_replays == 0
    (line,) = warnings_of(caplog)
    assert "makes the host wait for the device (aten::_local_scalar_dense)" in line
    model.model.norm = model.model.norm.norm
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs_of(engine).num_replays == NEW_TOKENS - 1


def test_experts_one_by_one_run_eagerly(recorded: dict[str, Any], graphs_of: Any) -> None:
    """transformers' "eager" experts loop over what `nonzero` finds."""
    model, prompts = make_model("qwen3_moe", torch.float32), make_prompts(2, seed=16)
    model.set_experts_implementation("eager")
    engine = Engine(model, **recorded)
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs_of(engine).num_replays == 0


def test_a_forward_that_fails_under_the_watch_alone(
    recorded: dict[str, Any], graphs_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompts = spread_llama(), make_prompts(2, seed=17)

    class Shy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.utils._python_dispatch._len_torch_dispatch_stack():
                raise TypeError("not with a mode")
            return super().forward(x)

    model.lm_head.__class__ = Shy
    engine = Engine(model, **recorded)
    with caplog.at_level(logging.INFO, "hf_accel"):
        assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs_of(engine).num_graphs == 0
    (line,) = warnings_of(caplog)
    assert "TypeError: not with a mode" in line


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "assign-by-mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "masked-select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().abs().flatten().bincount(),
    "repeat": lambda x: x.flatten().repeat_interleave(x.long().abs().flatten()),
    "equal": lambda x: torch.equal(x, x + 0),
    "other-device": lambda x: x.to("meta"),
}
CAPTURABLE = {
    "index": lambda x: x[torch.tensor([0, 1])],
    "assign": lambda x: x.clone().__setitem__(torch.tensor([0, 1]), 0.0),
    "masked-fill": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "repeat": lambda x: x.repeat_interleave(3, dim=0),
    "repeat-bounded": lambda x: x[0].repeat_interleave(torch.tensor([1, 0, 2]), output_size=3),
    "cast": lambda x: x.to(torch.float64),
    "sort": lambda x: x.sort(),
    "histc": lambda x: x.histc(bins=4, min=0, max=3),
}


@pytest.mark.parametrize(
    ("operation", "waits"),
    [(f, True) for f in WAITS.values()] + [(f, False) for f in CAPTURABLE.values()],
    ids=[f"waits-{name}" for name in WAITS] + [f"captures-{name}" for name in CAPTURABLE],
)
def test_the_watch(operation: Any, waits: bool) -> None:
    x = torch.randn(4, 3)
    with torch.no_grad(), HostSyncWatch() as watch:
        operation(x)
    assert bool(watch.found) == waits, watch.found


def test_tiny_tables_are_cut_to_the_engines_limit(recorded: dict[str, Any], graphs_of: Any) -> None:
    engine = Engine(make_tiny_llama(), **recorded, cuda_graph_batch_sizes=(2, 64))
    assert graphs_of(engine).sizes == (2, 7)
