"""During a step plain experts run through us with the model's own answers; other experts, and every config after it, are
untouched."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation

from hf_accel.patching import experts
from hf_accel.patching.experts import experts_configs, experts_on

from .configs import make_model

_DEEPSEEK = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_local_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 2, "topk_group": 1,
    "topk_method": "group_limited_greedy", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
PLAIN = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "phimoe", "granitemoe", "deepseek_v2", "deepseek_v3"]


def _model(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    if not family.startswith("deepseek"):
        return make_model(family, dtype, **overrides)
    config = AutoConfig.for_model(family, **_DEEPSEEK)
    config._experts_implementation = overrides.get("experts_implementation")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + noise * 0.2)
    return model.to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activation of each call that ran through us."""
    seen: list[str] = []
    ours = experts.moe_experts

    def counted(*args: torch.Tensor, activation: str) -> torch.Tensor:
        seen.append(activation)
        return ours(*args, activation=activation)

    monkeypatch.setattr(experts, "moe_experts", counted)
    return seen


def _num_experts_layers(model: nn.Module) -> int:
    return sum(isinstance(m._parameters.get("gate_up_proj"), nn.Parameter) for m in model.modules())


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("implementation", [None, "eager", "batched_mm"])
@pytest.mark.parametrize("family", PLAIN)
def test_same_logits(family: str, implementation: str | None, calls: list[str]) -> None:
    model = _model(family, **({"experts_implementation": implementation} if implementation else {}))
    configs = experts_configs(model)
    assert [id(config) for config in configs] == [id(model.config)]
    before = model.config.to_dict(), model.config._experts_implementation
    for shape in ((1, 1), (3, 1), (2, 11)):
        ids = torch.randint(3, 250, shape)
        expected = _logits(model, ids)
        assert not calls
        with experts_on(configs):
            out = _logits(model, ids)
        assert len(calls) == _num_experts_layers(model) > 0
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        calls.clear()
    assert before == (model.config.to_dict(), model.config._experts_implementation)
    assert implementation is None or model.config._experts_implementation == implementation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_close(dtype: torch.dtype, calls: list[str]) -> None:
    model = _model("qwen3_moe", dtype)
    ids = torch.randint(3, 250, (2, 9))
    expected = _logits(model, ids)
    with experts_on(experts_configs(model)):
        out = _logits(model, ids)
    assert calls
    assert (out - expected).float().norm() < 0.05 * expected.float().norm()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_with_biases_run_as_they_did(implementation: str, calls: list[str]) -> None:
    model = _model("gpt_oss", experts_implementation=implementation)
    assert not experts_configs(model)
    ids = torch.randint(3, 250, (2, 7))
    expected = _logits(model, ids)
    with experts_on([model.config]):
        assert model.config._experts_implementation != implementation
        out = _logits(model, ids)
    assert torch.equal(out, expected)
    assert not calls
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_what_we_do_not_compute_runs_as_it_did(family: str, implementation: str, calls: list[str]) -> None:
    model = _model(family, experts_implementation=implementation)
    ids = torch.randint(3, 250, (2, 7))
    layers = [m for m in model.modules() if "gate_up_proj" in m._parameters]

    def check(layers_of_ours: int) -> None:
        expected = _logits(model, ids)
        with experts_on([model.config]):
            out = _logits(model, ids)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == layers_of_ours
        calls.clear()

    check(len(layers))
    layers[0].act_fn = nn.Tanh()
    check(len(layers) - 1)
    layers[0].act_fn = nn.GELU(approximate="tanh")
    check(len(layers))
    layers[0]._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    layers[0]._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    check(len(layers) - 1)
    del layers[0]._apply_gate
    layers[0]._is_expert_parallel = True
    check(len(layers) - 1)
    layers[0]._is_expert_parallel = False
    parametrize.register_parametrization(layers[0], "down_proj", _Doubled())
    check(len(layers) - 1)
    if implementation == "eager":  # grouped_mm has no float64
        model.double()
        check(0)


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_gradients_and_autocast_run_as_they_did(calls: list[str]) -> None:
    model = _model("mixtral")
    ids = torch.randint(3, 250, (1, 5))
    gradients = []
    for configs in ([], experts_configs(model)):
        model.zero_grad()
        with experts_on(configs):
            model(ids).logits.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = _logits(model, ids)
        with experts_on(experts_configs(model)):
            out = _logits(model, ids)
    assert torch.equal(out, expected)
    assert not calls
    model.requires_grad_(False)
    with experts_on(experts_configs(model)):
        model(ids)
    assert len(calls) == _num_experts_layers(model)


def test_config_is_restored_after_an_exception() -> None:
    model = _model("olmoe")

    def step() -> None:
        with experts_on(experts_configs(model)):
            assert model.config._experts_implementation.startswith("hf_accel")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step()
    assert model.config._experts_implementation == "grouped_mm"
    assert not experts._switch._active


def test_steps_that_overlap_share_a_config(calls: list[str]) -> None:
    model = _model("olmoe")
    ids = torch.randint(3, 250, (1, 5))
    first, second = experts_on([model.config]), experts_on([model.config])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    _logits(model, ids)
    assert calls
    second.__exit__(None, None, None)
    calls.clear()
    _logits(model, ids)
    assert not calls and model.config._experts_implementation == "grouped_mm"


def test_two_threads() -> None:
    model = _model("qwen3_moe")
    inputs = [torch.randint(3, 250, (2, length)) for length in (1, 6)]
    expected = [_logits(model, ids) for ids in inputs]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(20):
                with experts_on(experts_configs(model)):
                    torch.testing.assert_close(_logits(model, inputs[index]), expected[index], rtol=1e-5, atol=1e-5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert model.config._experts_implementation == "grouped_mm" and not experts._switch._active


def test_weights_are_read_live() -> None:
    model = _model("mixtral")
    ids = torch.randint(3, 250, (1, 4))
    configs = experts_configs(model)
    with experts_on(configs):
        before = _logits(model, ids)
    with torch.no_grad():
        for module in model.modules():
            if "down_proj" in module._parameters:
                module.down_proj.mul_(-1)
    with experts_on(configs):
        after = _logits(model, ids)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, _logits(model, ids), rtol=1e-5, atol=1e-5)


def test_a_config_that_another_interface_reads_is_left_alone() -> None:
    model = _model("mixtral")

    class OtherInterface(ExpertsInterface):
        _global_mapping: ClassVar = dict(ALL_EXPERTS_FUNCTIONS)

    @use_experts_implementation(experts_interface=OtherInterface())
    class OtherExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert experts_configs(model)
    model.model.layers[1].mlp.experts = OtherExperts(model.config)
    assert not experts_configs(model)
