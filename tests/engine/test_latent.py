"""Models that keep latents: adapters, quantized and watched `kv_b_proj`s, weight updates, fp8 storage, memory."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import hf_accel
from hf_accel.config import FaultInjection
from hf_accel.kv_cache.mla_pool import FP8, MLAPool
from hf_accel.patching.deepseek import kv_b_matrix, latent_modules
from hf_accel_kernels.cpu import library

from ..patching.configs import left_padded, make_model

CONFIG: dict[str, Any] = {"page_size": 4, "num_pages": 128, "max_num_batched_tokens": 16}
CHECKED = {**CONFIG, "faults": FaultInjection(check_integrity=True)}
IDS, MASK = left_padded([5, 23, 11], seed=4)


def greedy(model: Any, num_tokens: int = 12) -> torch.Tensor:
    return model.generate(
        input_ids=IDS, attention_mask=MASK, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )


def absorbed(model: PreTrainedModel) -> list[bool]:
    """For each layer, whether it attends absorbed."""
    latent = hf_accel.get_engine(model).core.executor.runner._latent
    assert latent is not None
    return [latent._weights[m.layer_idx] is not None for m in latent.modules()]


def test_adapters_on_kv_b_proj() -> None:
    """On, off, on again, merged: HF's answer each time, absorbed throughout."""
    from peft import LoraConfig, get_peft_model

    model = make_model("deepseek_v3")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["kv_b_proj", "q_b_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config).eval()
    with wrapped.disable_adapter():
        plain = greedy(wrapped)
    adapted = greedy(wrapped)
    assert not torch.equal(plain, adapted)
    hf_accel.patch(wrapped, **CHECKED)
    for _ in range(2):
        assert torch.equal(greedy(wrapped), adapted)
        with wrapped.disable_adapter():
            assert torch.equal(greedy(wrapped), plain)
    assert absorbed(model) == [True] * 3
    wrapped.merge_adapter()
    assert torch.equal(greedy(wrapped), adapted)
    wrapped.unmerge_adapter()
    assert torch.equal(greedy(wrapped), adapted)
    assert hf_accel.get_engine(model).stats().fallback_reasons == {}
    hf_accel.unpatch(wrapped)
    assert torch.equal(greedy(wrapped), adapted)


class Int8Linear(nn.Module):
    """Weight-only int8, as quantizers leave it: no `weight`, a product all the same."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype))


class RoundingLinear(Int8Linear):
    """Quantizes its input too, row by row: no product any more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / 7
        return super().forward(torch.where(scale > 0, (x / scale).round() * scale, x))


@pytest.mark.parametrize(("kind", "is_absorbed"), [(Int8Linear, True), (RoundingLinear, False)])
def test_quantized_kv_b_proj(kind: type[Int8Linear], is_absorbed: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("deepseek_v2")
    for module in latent_modules(model):
        module.kv_b_proj = kind(module.kv_b_proj)
    expected = greedy(model)
    with caplog.at_level(logging.WARNING, logger="hf_accel"), hf_accel.patch(model, **CHECKED):
        assert torch.equal(greedy(model), expected)
        assert absorbed(model) == [is_absorbed] * 3
        assert torch.equal(greedy(model), expected)
    assert sum("expanded" in r.getMessage() for r in caplog.records) == (not is_absorbed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_of_an_adapter_is_what_it_computes(dtype: torch.dtype) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model("deepseek_v3", dtype)
    get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)).eval()
    for module in latent_modules(model):
        matrix = kv_b_matrix(module)
        assert matrix is not None and matrix.dtype == dtype
        x = torch.randn(7, matrix.shape[1]).to(dtype)
        with torch.no_grad():
            expected = module.kv_b_proj(x).float()
        error = (x.float() @ matrix.float().T - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_hooks_on_kv_b_proj_fire_and_count() -> None:
    """A hook that changes what kv_b_proj gives: HF's answer with it, and HF's answer again without it."""
    model = make_model("deepseek_v2")
    plain = greedy(model)
    target = latent_modules(model)[1].kv_b_proj
    hook = target.register_forward_hook(lambda module, args, output: output * 1.5)
    hooked = greedy(model)
    assert not torch.equal(plain, hooked)
    hook.remove()
    with hf_accel.patch(model, **CHECKED):
        assert torch.equal(greedy(model), plain)
        hook = target.register_forward_hook(lambda module, args, output: output * 1.5)
        assert torch.equal(greedy(model), hooked)
        assert absorbed(model) == [True, False, True]
        hook.remove()
        assert torch.equal(greedy(model), plain)
        assert absorbed(model) == [True] * 3


@pytest.mark.parametrize("pack_weights", [True, False])
def test_weight_updates_reach_the_absorbed_weights(pack_weights: bool) -> None:
    model = make_model("deepseek_v3")
    hf_accel.patch(model, **CHECKED, pack_weights=pack_weights)
    before = greedy(model)
    weights = [m.kv_b_proj.weight for m in latent_modules(model)]
    optimizer = torch.optim.AdamW(weights, lr=0.05, fused=True)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    got = greedy(model)
    assert not torch.equal(got, before)
    for weight in weights:
        weight.data.mul_(0.9)
    again = greedy(model)
    hf_accel.unpatch(model)
    assert torch.equal(greedy(model), again) and not torch.equal(got, again)
    for weight in weights:
        weight.data.div_(0.9)
    assert torch.equal(greedy(model), got)


def test_plain_forward_in_another_thread_is_untouched_while_a_step_runs() -> None:
    """The seam is an attribute of the attention modules while a step runs; only the step's own thread sees it."""
    import threading

    model = make_model("deepseek_v3")
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
    inside, go_on = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(20)

    model.model.layers[1].register_forward_pre_hook(wait)
    with hf_accel.patch(model, **CONFIG):
        thread = threading.Thread(target=greedy, args=(model, 2))
        thread.start()
        assert inside.wait(20)
        with torch.no_grad():
            got = model(IDS, attention_mask=MASK).logits
        go_on.set()
        thread.join()
    assert torch.equal(got, expected)


def test_fp8_storage_is_close_and_small() -> None:
    """Greedy tokens may part, so what is compared are the logits of one prompt's continuation."""
    model = make_model("deepseek_v3", torch.bfloat16)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    expected = model.generate(IDS[1:2], output_logits=True, **options)
    with hf_accel.patch(model, **CHECKED, kv_cache_dtype="fp8"):
        pool = hf_accel.get_engine(model).core.executor.runner.pool
        assert isinstance(pool, MLAPool) and pool.dtype == FP8
        assert pool.bytes_per_token == 3 * (32 + 8 + 2 * 4)
        got = model.generate(IDS[1:2], output_logits=True, **options)
        assert hf_accel.get_engine(model).stats().fallback_reasons == {}
    first, reference = got.logits[0].float(), expected.logits[0].float()
    error = float((first - reference).norm() / reference.norm())
    assert 0 < error < 0.15, error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_without_a_packed_form(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """float64 has no kernel: torch ops, with one log line that says so; float16 has no packed weights."""
    model = make_model("minicpm3", dtype)
    expected = greedy(model)
    with caplog.at_level(logging.WARNING, logger="hf_accel"), hf_accel.patch(model, **CHECKED):
        for _ in range(2):
            assert torch.equal(greedy(model), expected)
        assert hf_accel.get_engine(model).stats().fallback_reasons == {}
    on_torch = dtype == torch.float64 or library.load()[0] is None
    assert sum("torch ops" in r.getMessage() for r in caplog.records) == on_torch


def test_fp8_is_refused_for_models_with_keys_and_values() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        hf_accel.patch(make_model("llama"), kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="auto, fp8"):
        hf_accel.patch(make_model("llama"), kv_cache_dtype="int4")


def test_bytes_of_a_token() -> None:
    """The formula: rank + rope values a layer, against heads x (key + value) of an expanded cache."""
    model = make_model("deepseek_v2")
    engine = hf_accel.Engine(model, **CONFIG)
    pool = engine.core.executor.runner.pool
    assert isinstance(pool, MLAPool)
    assert pool.bytes_per_token == 3 * (32 + 8) * 4
    assert pool.num_bytes == pool.bytes_per_token * 128 * 4
    engine.sleep()
    assert pool.num_bytes == 0 and pool.is_released
    assert engine.generate([[5, 6, 7]], hf_accel.SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids
    assert pool.num_bytes == pool.bytes_per_token * 128 * 4
    engine.shutdown()


def test_patched_models_copy_and_unpatch_exactly() -> None:
    model = make_model("deepseek_v3")
    expected = greedy(model)
    attributes = [dict(vars(m)) for m in model.modules()]
    hf_accel.patch(model, **CONFIG)
    greedy(model)
    twin = copy.deepcopy(model)
    assert torch.equal(greedy(twin), expected)
    hf_accel.unpatch(model)
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(greedy(model), expected)
