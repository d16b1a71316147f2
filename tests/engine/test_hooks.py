"""Forward hooks of the user on a patched model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import hf_accel
from hf_accel.patching.registry import read_spec

from ..cpp_ops import needs_cpp_ops
from .patched_calls import CONFIG, LENGTH, PROMPT, tokens


@pytest.mark.parametrize(
    "where", ["model.layers.0.self_attn.o_proj", "model.layers.1", "model.embed_tokens", "lm_head", ""]
)
def test_a_hook_that_changes_the_output_changes_the_tokens(tiny_llama, where):
    def double(module, args, output):
        if isinstance(output, torch.Tensor):
            return output.flip(-1)
        if hasattr(output, "logits"):
            output.logits = output.logits.flip(-1)
            return output
        return (output[0].flip(-1), *output[1:])

    before = tokens(tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(tiny_llama) == before
    hook = tiny_llama.get_submodule(where).register_forward_hook(double)
    expected = tokens(copy.deepcopy(tiny_llama))
    assert expected != before
    hf_accel.get_engine(tiny_llama).flush_cache()
    assert tokens(tiny_llama) == expected
    hook.remove()
    hf_accel.get_engine(tiny_llama).flush_cache()
    assert tokens(tiny_llama) == before


def test_a_hook_registered_between_calls_is_not_answered_from_the_old_cache(tiny_llama):
    before = tokens(tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(tiny_llama) == before
    vector = torch.randn(64)
    steered = tiny_llama.model.layers[0].register_forward_hook(lambda module, args, output: output + vector)
    expected = tokens(copy.deepcopy(tiny_llama))
    assert expected != before
    for _ in range(2):
        assert tokens(tiny_llama) == expected
    steered.remove()
    assert tokens(tiny_llama) == before


def test_hooks_see_each_token_once(tiny_llama):
    hf_accel.patch(tiny_llama, **CONFIG)
    counts = {"pre": 0, "post": 0}

    def pre(module, args):
        counts["pre"] += args[0].shape[1]

    def post(module, args, output):
        counts["post"] += args[0].shape[1]

    tiny_llama.model.layers[0].mlp.register_forward_pre_hook(pre)
    tiny_llama.model.layers[0].mlp.register_forward_hook(post)
    tokens(tiny_llama)
    total = 2 * (PROMPT.shape[1] + LENGTH - 1)
    assert counts == {"pre": total, "post": total}
    tokens(tiny_llama)
    assert counts == {"pre": 2 * total, "post": 2 * total}  # no token of a later call comes from the cache
    assert hf_accel.get_engine(tiny_llama).stats().num_fallbacks == 0


def test_patching_fires_no_hook(tiny_llama):
    fired = []
    for module in tiny_llama.modules():
        module.register_forward_hook(lambda module, *args: fired.append(module))
    read_spec(tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    assert fired == []
    tokens(tiny_llama)
    assert set(map(type, fired)) >= {nn.Linear, LlamaForCausalLM}


@needs_cpp_ops
def test_what_transformers_leaves_after_output_hidden_states_is_no_hook(tiny_llama):
    tiny_llama(PROMPT, output_hidden_states=True)
    assert tiny_llama.model.layers[0]._forward_hooks  # its recorder, asleep
    hf_accel.patch(tiny_llama, **CONFIG)
    expected = tokens(copy.deepcopy(tiny_llama))
    for _ in range(2):
        assert tokens(tiny_llama) == expected
    engine = hf_accel.get_engine(tiny_llama)
    assert engine.core.executor.runner.fused
    assert engine.stats().num_cached_tokens == 2 * 36
    assert len(tiny_llama(PROMPT, output_hidden_states=True).hidden_states) == 3
