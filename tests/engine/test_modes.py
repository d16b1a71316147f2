"""Whatever state the model is in, HF's own answer: from the engine where it can, else from the original with a reason."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_accel
from hf_accel import SamplingParams

from .patched_calls import CONFIG, LENGTH, PROMPT, reasons, tokens


@pytest.fixture
def patched(tiny_llama):
    """Patched before the test changes its state, with the prompt in the cache."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    hf_accel.patch(tiny_llama, **CONFIG)
    tokens(tiny_llama)
    yield tiny_llama
    hf_accel.get_engine(tiny_llama).check_integrity()
    hf_accel.unpatch(tiny_llama)


# -- modes --


def test_train_mode_with_active_dropout(patched):
    patched.config.attention_dropout = 0.4
    for layer in patched.model.layers:
        layer.self_attn.attention_dropout = 0.4
    twin = copy.deepcopy(patched)
    patched.train()
    twin.train()
    for seed in range(3):
        torch.manual_seed(seed)
        expected = tokens(twin)
        torch.manual_seed(seed)
        assert tokens(patched) == expected
    assert reasons(patched) == {"the model is in training mode with active dropout": 3}
    engine = hf_accel.get_engine(patched)
    with pytest.raises(ValueError, match="training mode with active dropout"):
        engine.generate([[1, 2, 3]])
    patched.eval()
    twin.eval()
    assert tokens(patched) == tokens(twin)
    assert sum(reasons(patched).values()) == 3


def test_patching_in_train_mode_draws_no_random_number():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=256, resid_pdrop=0.5, embd_pdrop=0.5))
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    hf_accel.patch(model, **CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert tokens(model, pad_token_id=0) == tokens(copy.deepcopy(model), pad_token_id=0)
    assert reasons(model) == {}


def test_train_mode_without_dropout_runs_on_the_engine(patched):
    expected = tokens(patched)
    patched.train()
    assert tokens(patched) == expected
    assert patched.training
    assert reasons(patched) == {}


def test_gradient_checkpointing(patched):
    twin = copy.deepcopy(patched)
    for model in (patched, twin):
        model.gradient_checkpointing_enable()
        model.train()
    assert tokens(patched) == tokens(twin)
    assert reasons(patched) == {"the model is in training mode with gradient checkpointing": 1}
    patched.eval()
    twin.eval()
    assert tokens(patched) == tokens(twin)


def test_autocast(patched):
    twin = copy.deepcopy(patched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokens(patched) == tokens(twin)
        assert reasons(patched) == {"autocast is on": 1}
    assert tokens(patched) == tokens(twin)
    assert reasons(patched) == {"autocast is on": 1}


def test_autograd_on(patched):
    with torch.enable_grad():
        assert tokens(patched) == tokens(copy.deepcopy(patched))
    assert reasons(patched) == {}


COMPILE = {
    "model": lambda model: model.compile(backend="eager"),
    "submodule in place": lambda model: model.model.layers[0].mlp.compile(backend="eager"),
    "submodule replaced": lambda model: model.model.layers.__setitem__(
        0, torch.compile(model.model.layers[0], backend="eager")
    ),
}


@pytest.mark.parametrize("what", COMPILE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled(tiny_llama, what, when):
    expected = tokens(tiny_llama)
    if when == "before":
        COMPILE[what](tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    if when == "after":
        assert tokens(tiny_llama) == expected
        COMPILE[what](tiny_llama)
    assert tokens(tiny_llama) == expected
    assert reasons(tiny_llama) == {"the model or one of its modules is compiled by torch.compile": 1}


def test_an_optimized_module_cannot_be_patched(tiny_llama):
    compiled = torch.compile(tiny_llama, backend="eager")
    with pytest.raises(hf_accel.UnsupportedModelError, match="patch the model itself, before compiling"):
        hf_accel.patch(compiled)


def test_another_dtype(patched):
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        patched.to(dtype)
        found = tokens(patched)
        assert hf_accel.get_engine(patched).core.executor.runner.pool.dtype == dtype
        if dtype != torch.bfloat16:
            assert found == tokens(copy.deepcopy(patched))


def test_a_request_that_runs_while_the_dtype_changes_fails_alone(patched, assert_idle):
    engine = hf_accel.get_engine(patched)
    old = engine.add_request(PROMPT[0], SamplingParams(temperature=0, max_tokens=30))
    engine.step()
    patched.to(torch.float64)
    new = engine.add_request(PROMPT[0], SamplingParams(temperature=0, max_tokens=LENGTH))
    assert new != old
    output = engine.result(old)
    assert "changed its device or dtype while this request was running" in str(output.error)
    assert engine.result(new).outputs[0].token_ids == tokens(copy.deepcopy(patched))[0]
    assert engine.stats().num_prompt_tokens == 3 * 37 + 37
    assert_idle(engine)


# -- accelerate --


def test_accelerate_on_one_device(patched):
    accelerate = pytest.importorskip("accelerate")
    expected = tokens(patched)
    accelerate.dispatch_model(patched, {"": "cpu"}, force_hooks=True)
    assert hasattr(patched, "_hf_hook")
    assert tokens(patched) == expected
    assert reasons(patched) == {}


def test_accelerate_map_over_one_device(tiny_llama):
    accelerate = pytest.importorskip("accelerate")
    expected = tokens(tiny_llama)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    accelerate.dispatch_model(tiny_llama, device_map, force_hooks=True)
    hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(tiny_llama) == expected
    assert reasons(tiny_llama) == {}


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_offload(tiny_llama, when):
    accelerate = pytest.importorskip("accelerate")
    expected = tokens(tiny_llama)
    if when == "before":
        accelerate.cpu_offload(tiny_llama, execution_device=torch.device("cpu"))
    hf_accel.patch(tiny_llama, **CONFIG)
    if when == "after":
        assert tokens(tiny_llama) == expected
        accelerate.cpu_offload(tiny_llama, execution_device=torch.device("cpu"))
    assert tokens(tiny_llama) == expected
    assert reasons(tiny_llama) == {"weights are offloaded by accelerate": 1}


def test_a_device_map_over_two_devices_falls_back(patched):
    expected = tokens(patched)
    patched.hf_device_map = {"model": 0, "lm_head": 1}
    assert tokens(patched) == expected
    assert reasons(patched) == {"the model is spread over several devices (hf_device_map)": 1}
