"""Graphs follow the model: captured again where they bake in what changed, and only there. A recording that outlived its model
would give the old model's tokens."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import hf_accel
from hf_accel import Engine

from ...patching.configs import make_model
from ..weights.test_live_weights import CHANGES
from ..weights.ways import backward, make_llama
from .test_graph_engine import NEW_TOKENS, hf_tokens, make_prompts, spread_llama, tokens

PROMPTS = make_prompts(2, seed=21)

IN_PLACE = {  # values change, addresses do not
    "adamw-fused", "adamw-foreach", "adamw-loop", "sgd-fused", "custom-data-optimizer", "data_add", "data_add_one_matrix",
    "no_grad_write", "inference_mode_write", "load_state_dict", "change_buffer", "prune_a_head_of_the_weights",
}  # fmt: skip


class Watched:
    """An engine whose answers are compared with a fresh copy of its model, and whose captures are counted."""

    def __init__(self, model: Any, recorded: dict[str, Any]) -> None:
        self.model, self.engine = model, Engine(model, **recorded)
        self.graphs = self.engine.core.executor.runner.graphs
        assert self.check() == 1

    def check(self, replayed: bool = True) -> int:
        """Whether the answers are right and replayed; returns how often something was captured for them."""
        graphs = self.engine.core.executor.runner.graphs
        captures, before = graphs.num_captures, graphs.num_replays
        base = self.model.base_model.model if hasattr(self.model, "peft_config") else self.model
        expected = [hf_tokens(copy.deepcopy(base), prompt) for prompt in PROMPTS]
        assert tokens(self.engine, PROMPTS) == expected
        first = (
            graphs.num_replays - before - (NEW_TOKENS - 1)
        )  # with the prompts in the cache the first step decodes, too
        assert first in (0, 1) if replayed else graphs.num_replays == before
        return graphs.num_captures - captures


@pytest.mark.parametrize("name", CHANGES)
def test_each_way_of_changing_weights(name: str, recorded: dict[str, Any]) -> None:
    model = make_llama()
    watched = Watched(model, recorded)
    CHANGES[name](model)
    assert watched.check() == (name not in IN_PLACE)
    assert watched.check() == 0


def test_changes_between_two_steps_by_hand(recorded: dict[str, Any]) -> None:
    """No call begins in between: a replay would read memory that is no longer the weights'."""
    model, prompt = make_llama(), PROMPTS[0]
    engine = Engine(model, **recorded)
    graphs = engine.core.executor.runner.graphs
    tokens(engine, [prompt])
    request = engine.add_request(input_ids=prompt)
    for _ in range(3):
        engine.step()
    device = engine.core.executor.queue
    device.synchronize()  # what is in flight on CPU reads the weights
    before = graphs.num_replays
    model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)
    engine.step()
    device.synchronize()
    assert graphs.num_replays == before and graphs.num_graphs == 0
    engine.abort(request)
    assert tokens(engine, [prompt])[0] == [0] * NEW_TOKENS
    assert graphs.num_replays > before


@pytest.fixture
def lora(recorded: dict[str, Any]) -> Watched:
    peft = pytest.importorskip("peft")
    config = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(make_llama(), peft.LoraConfig(**config), adapter_name="one").eval()
    wrapped.add_adapter("two", peft.LoraConfig(**config))
    return Watched(wrapped, recorded)


def test_adapters(lora: Watched) -> None:
    model = lora.model
    for _ in range(2):
        model.set_adapter("two")
        assert lora.check() == 1
        assert lora.check() == 0
        model.set_adapter("one")
        assert lora.check() == 1
    with model.disable_adapter():
        assert lora.check() == 1
    assert lora.check() == 1
    model.merge_adapter()
    assert lora.check() == 1
    model.unmerge_adapter()
    assert lora.check() == 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    backward(model)
    optimizer.step()
    assert lora.check() == 0


def test_sleep_and_wake(recorded: dict[str, Any]) -> None:
    watched = Watched(spread_llama(), recorded)
    maker = watched.graphs._maker
    watched.engine.sleep()
    assert (maker.num_released, watched.graphs.num_graphs, maker.captured) == (1, 0, [])
    assert watched.check() == 1
    watched.engine.shutdown()
    assert maker.num_released == 2


def test_another_dtype(recorded: dict[str, Any]) -> None:
    model = spread_llama()
    watched = Watched(model, recorded)
    replays = watched.engine.stats().num_graph_replays
    model.double()
    expected = [hf_tokens(model, prompt) for prompt in PROMPTS]
    assert tokens(watched.engine, PROMPTS) == expected
    graphs = watched.engine.core.executor.runner.graphs
    assert graphs is not watched.graphs and watched.graphs.num_graphs == 0
    assert graphs.num_captures == 1 and graphs.num_replays == NEW_TOKENS - 1
    assert watched.engine.stats().num_graph_replays == replays + NEW_TOKENS - 1


def test_training_mode(recorded: dict[str, Any]) -> None:
    """Allowed without dropout; modules may act differently in it."""
    model = spread_llama()

    class Moody(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (-1 if self.training else 1)

    model.lm_head.__class__ = Moody
    watched = Watched(model, recorded)
    model.train()
    assert watched.check() == 1
    model.eval()
    assert watched.check() == 1


def set_scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


def set_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 1.0


def replace_class(model: Any) -> None:
    class Halved(type(model.lm_head)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    model.lm_head.__class__ = Halved


@pytest.mark.parametrize("change", [set_scaling, set_epsilon, replace_class], ids=lambda f: f.__name__)
def test_constants_and_classes(change: Any, recorded: dict[str, Any]) -> None:
    watched = Watched(spread_llama(), recorded)
    change(watched.model)
    watched.engine.flush_cache()  # the prefix cache knows weights, not constants
    assert watched.check() == 1
    assert watched.check() == 0


def test_a_softcap_in_the_configuration(recorded: dict[str, Any]) -> None:
    model = make_model("gemma2", torch.float32)
    watched = Watched(model, recorded)
    model.config.final_logit_softcapping = 0.5
    assert watched.check() == 1


def test_a_tensor_that_is_neither_parameter_nor_buffer(recorded: dict[str, Any]) -> None:
    class Shifted(nn.Linear):
        shift: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.shift

    model = spread_llama()
    model.lm_head.__class__, model.lm_head.shift = Shifted, torch.zeros(256)
    watched = Watched(model, recorded)
    model.lm_head.shift = torch.randn(256) * 3
    assert watched.check() == 1
    model.lm_head.shift.neg_()
    assert watched.check() == 0


def test_a_patched_class(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(spread_llama(), recorded)
    kind = type(watched.model.model.norm)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x.tanh()))
    watched.engine.flush_cache()
    assert watched.check() == 1


def test_hooks_fire_and_graphs_outlive_them(recorded: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(spread_llama(), recorded)
    calls = []
    hook = watched.model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.INFO, "hf_accel"):
        tokens(watched.engine, PROMPTS[:1])
        tokens(watched.engine, PROMPTS[:1])
    assert len(calls) == 2 * NEW_TOKENS
    lines = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert lines == ["hf_accel runs decode steps without CUDA graphs: a hook is registered on a LlamaDecoderLayer"]
    hook.remove()
    assert watched.check() == 0
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1)):
        calls.clear()
        tokens(watched.engine, PROMPTS[:1])
        assert len(calls) > 100
    assert watched.check() == 0
    watched.model.model.norm.forward = watched.model.model.norm.forward  # anything may stand here
    assert watched.check(replayed=False) == 0
    del watched.model.model.norm.forward
    assert watched.check() == 0


def test_expanded_latents_run_eagerly(recorded: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Their calls are cut at lengths that only the host knows."""
    model = make_model("deepseek_v3", torch.float32)
    watched = Watched(model, recorded)
    assert watched.check() == 0
    linear = model.model.layers[1].self_attn.kv_b_proj
    linear.bias = nn.Parameter(torch.randn(linear.out_features))
    with caplog.at_level(logging.INFO, "hf_accel"):
        assert watched.check(replayed=False) == 0
    assert any("the latents of some layer are expanded" in r.getMessage() for r in caplog.records)


def test_absorbed_weights_at_another_address(recorded: dict[str, Any]) -> None:
    """Absorbed from an adapter's product, they are made anew at each change of the weights."""
    peft = pytest.importorskip("peft")
    config = {"r": 4, "lora_alpha": 32, "target_modules": ["kv_b_proj"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(make_model("deepseek_v3", torch.float32), peft.LoraConfig(**config)).eval()
    watched = Watched(wrapped, recorded)
    with torch.no_grad():
        wrapped.base_model.model.model.layers[0].self_attn.kv_b_proj.lora_A["default"].weight.mul_(-2)
    assert watched.check() == 1


def test_unpatching_releases_the_graphs(recorded: dict[str, Any]) -> None:
    model = hf_accel.patch(spread_llama(), **recorded)
    hf_tokens(model, PROMPTS[0])
    graphs = hf_accel.get_engine(model).core.executor.runner.graphs
    assert graphs.num_graphs == 1
    hf_accel.unpatch(model)
    assert graphs.num_graphs == 0
