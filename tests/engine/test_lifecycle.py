"""A patched model stays the user's model: unpatching leaves no trace, and whatever else is done to it keeps working."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

import hf_accel
from hf_accel import Engine, SamplingParams, UnsupportedModelError
from hf_accel.engine import patch as patch_module
from hf_accel.engine import weights
from hf_accel.patching import hooks

from .patched_calls import CONFIG, LENGTH, PROMPT, tokens


def snapshot(model) -> dict:
    """Everything that a patch could leave behind."""
    cls = type(model)
    return {
        "attributes": {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()},
        "classes": {type(m): dict(vars(type(m))) for m in model.modules()}
        | {GenerationMixin: dict(vars(GenerationMixin))},
        "mro": cls.__mro__,
        "state": {k: (id(v), v.data_ptr(), v._version) for k, v in model.state_dict(keep_vars=True).items()},
        "hooks": {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
        "generation_config": model.generation_config.to_dict(),
    }


@pytest.fixture(autouse=True)
def _no_models_of_other_tests() -> None:
    gc.collect()
    assert not patch_module._patched


# -- patch and unpatch --


def test_unpatch_leaves_no_trace(tiny_llama):
    tiny_llama.model.norm.register_forward_hook(lambda *args: None)
    before = snapshot(tiny_llama)
    logits = tiny_llama(PROMPT).logits
    random_state, num_optimizer_hooks = torch.get_rng_state(), len(_global_optimizer_post_hooks)
    assert hf_accel.patch(tiny_llama, **CONFIG) is tiny_llama
    patched = snapshot(tiny_llama)
    assert {k for k in patched if patched[k] != before[k]} == {"classes"}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert "_sample" in vars(LlamaForCausalLM)
    tokens(tiny_llama)
    assert torch.equal(tiny_llama(PROMPT).logits, logits)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hf_accel.unpatch(tiny_llama) is tiny_llama
    assert snapshot(tiny_llama) == before
    assert len(_global_optimizer_post_hooks) <= num_optimizer_hooks
    assert torch.equal(tiny_llama(PROMPT).logits, logits)
    assert not hooks._instances
    assert hf_accel.unpatch(tiny_llama) is tiny_llama  # again is fine


def test_patching_again_replaces_the_options(tiny_llama):
    before = snapshot(tiny_llama)
    expected = tokens(tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    first = hf_accel.get_engine(tiny_llama)
    assert tokens(tiny_llama) == expected
    hf_accel.patch(tiny_llama, num_pages=64, page_size=4)
    second = hf_accel.get_engine(tiny_llama)
    assert second is not first
    assert second.config.page_size == 4
    assert first.core.executor.runner.pool.num_bytes == 0
    assert tokens(tiny_llama) == expected
    hf_accel.unpatch(tiny_llama)
    assert snapshot(tiny_llama) == before


def test_is_patched_and_get_engine(tiny_llama):
    assert not hf_accel.is_patched(tiny_llama)
    with pytest.raises(ValueError, match="the model is not patched: call"):
        hf_accel.get_engine(tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    assert hf_accel.is_patched(tiny_llama)
    assert hf_accel.get_engine(tiny_llama) is hf_accel.get_engine(tiny_llama)
    hf_accel.unpatch(tiny_llama)
    assert not hf_accel.is_patched(tiny_llama)


def test_context_manager(tiny_llama):
    before = snapshot(tiny_llama)
    with hf_accel.patch(tiny_llama, **CONFIG) as model:
        assert model is tiny_llama
        tokens(model)
        engine = hf_accel.get_engine(model)
        assert engine.stats().num_generated_tokens == 2 * LENGTH
    assert snapshot(tiny_llama) == before
    assert engine.core.executor.runner.pool.num_bytes == 0
    with pytest.raises(ZeroDivisionError), hf_accel.patch(tiny_llama, **CONFIG):
        raise ZeroDivisionError
    assert snapshot(tiny_llama) == before


@pytest.mark.parametrize("part", ["spec", "install", "config"])
def test_a_failing_patch_changes_nothing(tiny_llama, monkeypatch, part):
    before = snapshot(tiny_llama)
    if part == "config":
        error, options = ValueError, {"no_such_option": 1}
    elif part == "install":
        error, options = ZeroDivisionError, CONFIG
        monkeypatch.setattr(hooks, "_dispatching", lambda *args: 1 / 0)
    else:
        error, options = UnsupportedModelError, CONFIG
        tiny_llama.config.kv_lora_rank = 8
        before = snapshot(tiny_llama)
    with pytest.raises(error):
        hf_accel.patch(tiny_llama, **options)
    assert snapshot(tiny_llama) == before
    assert not hf_accel.is_patched(tiny_llama)
    assert not hooks._instances


def test_an_unsupported_model_says_why():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    for wrong, reason in (
        (T5ForConditionalGeneration(config), "encoder-decoder"),
        (nn.Linear(2, 2), "expected a transformers causal language model"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            hf_accel.patch(wrong)


def test_two_models_of_one_class_are_independent(tiny_llama):
    twin = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1)
    expected = [tokens(tiny_llama), tokens(twin)]
    hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(twin) == expected[1]  # on its own code
    hf_accel.patch(twin, **CONFIG)
    for _ in range(2):
        assert [tokens(tiny_llama), tokens(twin)] == expected
    hf_accel.unpatch(tiny_llama)
    assert "_sample" in vars(LlamaForCausalLM)  # the other one still needs it
    assert [tokens(tiny_llama), tokens(twin)] == expected
    assert hf_accel.get_engine(twin).stats().num_generated_tokens == 3 * 2 * LENGTH
    hf_accel.unpatch(twin)
    assert "_sample" not in vars(LlamaForCausalLM)


def test_a_subclass_and_its_parent(tiny_llama):
    class Mine(LlamaForCausalLM):
        pass

    mine = Mine(tiny_llama.config).eval()
    expected = [tokens(tiny_llama), tokens(mine)]
    hf_accel.patch(tiny_llama, **CONFIG)
    hf_accel.patch(mine, **CONFIG)
    assert [tokens(tiny_llama), tokens(mine)] == expected
    hf_accel.unpatch(tiny_llama)
    assert [tokens(tiny_llama), tokens(mine)] == expected
    hf_accel.unpatch(mine)
    assert "_sample" not in vars(Mine)
    assert "_sample" not in vars(LlamaForCausalLM)


@pytest.mark.parametrize("fused", [True, False])
def test_a_deleted_model_is_freed_with_its_engine(fused):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    hf_accel.patch(model, fused=fused, **CONFIG)
    tokens(model)
    engine = hf_accel.get_engine(model)
    refs = [weakref.ref(x) for x in (model, engine, engine.core.executor.runner.pool.k_pages[0], model.lm_head.weight)]
    del model, engine
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    assert not hooks._instances
    assert "_sample" not in vars(LlamaForCausalLM)
    assert not weights._TRACKERS and weights._after_optimizer_step not in _global_optimizer_post_hooks.values()


def test_an_engine_keeps_its_model_and_goes_with_it(tiny_llama):
    engine = Engine(copy.deepcopy(tiny_llama), **CONFIG)
    gc.collect()
    assert len(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
    ref = weakref.ref(engine.model)
    del engine
    gc.collect()
    assert ref() is None


# -- copies, saving, training --


def test_pickle_copy_and_save(tiny_llama, tmp_path):
    expected = tokens(tiny_llama)
    state = {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(tiny_llama) == expected
    buffer = io.BytesIO()
    torch.save(tiny_llama, buffer)
    buffer.seek(0)
    tiny_llama.save_pretrained(tmp_path)
    copies = {
        "pickle": pickle.loads(pickle.dumps(tiny_llama)),
        "deepcopy": copy.deepcopy(tiny_llama),
        "torch.save": torch.load(buffer, weights_only=False),
        "save_pretrained": LlamaForCausalLM.from_pretrained(tmp_path).eval(),
    }
    for name, model in copies.items():
        assert not hf_accel.is_patched(model), name
        assert type(model) is LlamaForCausalLM
        assert tokens(model) == expected
        assert model.config._attn_implementation == tiny_llama.config._attn_implementation
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        hf_accel.patch(model, **CONFIG)
        assert tokens(model) == expected
    assert all(torch.equal(v, state[k]) for k, v in tiny_llama.state_dict().items())
    assert "hf_accel" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("training", [True, False])
def test_a_training_step_equals_that_of_an_unpatched_twin(tiny_llama, training):
    twin = copy.deepcopy(tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    tokens(tiny_llama)
    losses = []
    for model in (tiny_llama, twin):
        model.train(training)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss = model(input_ids=PROMPT, labels=PROMPT).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if model is tiny_llama:
                tokens(model)  # generating between steps takes nothing from training
    assert losses[:3] == losses[3:]
    for ours, theirs in zip(tiny_llama.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad


def test_inference_mode_and_back(tiny_llama):
    expected = tokens(tiny_llama)
    for fused in (True, False):
        for backend in ("auto", "torch"):
            hf_accel.patch(tiny_llama, fused=fused, attention_backend=backend, **CONFIG)
            with torch.inference_mode():
                assert tokens(tiny_llama) == expected
            assert tokens(tiny_llama) == expected
            with torch.inference_mode():
                assert tokens(tiny_llama) == expected
            tiny_llama(input_ids=PROMPT, labels=PROMPT).loss.backward()
            assert hf_accel.get_engine(tiny_llama).stats().num_fallbacks == 0
