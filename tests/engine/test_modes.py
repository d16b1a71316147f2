"""Whatever state the model is in, HF's own answer: from the engine where it can, else from the original with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.engine.patch import _patched
from hf_accel.patching import hooks

CONFIG = {"num_pages": 128, "page_size": 8}
PROMPT = torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(3))
LENGTH = 8


def tokens(model, **options) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": LENGTH} | options
    return model.generate(input_ids=PROMPT, **options)[:, PROMPT.shape[1] :].tolist()


def reasons(model) -> dict[str, int]:
    return hf_accel.get_engine(model).stats().fallback_reasons


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


# -- linears that are not plain --


class PackedLinear(nn.Module):
    """A stand-in for a quantizer's module: no `weight`, int8 data and scales of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed.to(x.dtype) * self.scale).T


class ScaledWeight(torch.Tensor):
    """A tensor subclass whose values are not in its memory as such: `F.linear` gets them by `__torch_function__`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, *rest = args
            return func(x, weight.as_subclass(torch.Tensor) * 3.0, *rest)
        return super().__torch_function__(func, types, args, kwargs or {})


def replace_linears(model, make) -> None:
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))


def pack(model):
    replace_linears(model, PackedLinear)


def subclass_weight(model):
    def make(linear):
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(ScaledWeight), requires_grad=False)
        return linear

    replace_linears(model, make)


def subclass_linear(model):
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.5

    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Half


def dynamic_int8(model):
    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    quantize(model.model.layers, {nn.Linear}, dtype=torch.qint8, inplace=True)


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [pack, subclass_weight, subclass_linear, dynamic_int8, torchao_int8])
@pytest.mark.parametrize("when", ["before", "after", "after, own layers"])
def test_linears_that_are_not_plain(tiny_llama, change, when):
    before = tokens(tiny_llama)
    if when != "before":
        hf_accel.patch(tiny_llama, fused=when == "after", **CONFIG)
        assert tokens(tiny_llama) == before
        assert hf_accel.get_engine(tiny_llama).core.executor.runner.fused == (when == "after")
    change(tiny_llama)
    expected = hf_tokens(tiny_llama)
    if when == "before":
        hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(tiny_llama) == expected
    assert tokens(tiny_llama) == expected
    assert reasons(tiny_llama) == {}
    assert not hf_accel.get_engine(tiny_llama).core.executor.runner.fused


def hf_tokens(model) -> list[list[int]]:
    """The original's answer, on the model itself (some quantized tensors cannot be copied)."""
    engine_run = _patched.pop(model, None)
    instances = hooks._instances.get(type(model), {})
    entry = instances.pop(id(model), None)
    try:
        return tokens(model)
    finally:
        if engine_run is not None:
            _patched[model] = engine_run
            instances[id(model)] = entry


# -- PEFT --


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("outer", [True, False], ids=["wrapper", "inner model"])
def test_lora_on_all_linears(tiny_llama, peft, outer):
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama, config).eval()
    expected = tokens(copy.deepcopy(model))
    assert hf_accel.patch(model if outer else tiny_llama, **CONFIG) is (model if outer else tiny_llama)
    assert hf_accel.is_patched(model)
    assert hf_accel.is_patched(tiny_llama)
    for _ in range(2):
        assert tokens(model) == expected
        assert tokens(tiny_llama) == expected
    assert reasons(model) == {}
    assert hf_accel.get_engine(model).stats().num_cached_tokens > 0
    hf_accel.unpatch(model)
    assert not hf_accel.is_patched(tiny_llama)
    assert tokens(model) == expected


def test_a_peft_model_as_context_manager(tiny_llama, peft):
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    with hf_accel.patch(model, **CONFIG) as same:
        assert same is model
        assert hf_accel.is_patched(model)
        tokens(model)
    assert not hf_accel.is_patched(model)
    assert "__enter__" not in vars(type(model))


def test_adapters_of_one_batch_fall_back(tiny_llama, peft):
    config = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(**config), adapter_name="one").eval()
    model.add_adapter("two", peft.LoraConfig(**config))
    expected = tokens(model, adapter_names=["one", "two"])
    hf_accel.patch(model, **CONFIG)
    tokens(model)
    assert tokens(model, adapter_names=["one", "two"]) == expected
    assert tokens(model, adapter_names=["two", "__base__"]) == tokens(
        copy.deepcopy(model), adapter_names=["two", "__base__"]
    )


def test_prompt_tuning_falls_back(tiny_llama, peft):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(tiny_llama, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    expected = tokens(model)
    hf_accel.patch(model, **CONFIG)
    assert tokens(model) == expected
    assert sum(reasons(model).values()) == 1
    plain = tokens(copy.deepcopy(tiny_llama))
    assert plain != expected
    assert tokens(tiny_llama) == plain  # the inner model alone, after PEFT put its method back
    assert (
        Engine(tiny_llama, **CONFIG)
        .generate([PROMPT[0]], SamplingParams(temperature=0, max_tokens=LENGTH))[0]
        .outputs[0]
        .token_ids
        == plain[0]
    )
