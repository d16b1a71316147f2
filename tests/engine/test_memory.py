"""KV memory of a patched model: taken at the first call, given back by unpatch and sleep."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

import hf_accel
from hf_accel.engine import patch as patch_module

from ..cpp_ops import needs_cpp_ops
from .patched_calls import CONFIG, tokens


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_cpp_ops), False])
def test_unpatch_gives_the_memory_back(tiny_llama, fused):
    hf_accel.patch(tiny_llama, fused=fused, **CONFIG)
    tokens(tiny_llama)
    engine = hf_accel.get_engine(tiny_llama)
    runner = engine.core.executor.runner
    pages = [weakref.ref(t) for t in (*runner.pool.k_pages, *runner.pool.v_pages)]
    assert runner.pool.num_bytes > 0
    assert (runner._fused is not None) == fused
    hf_accel.unpatch(tiny_llama)
    assert runner.pool.num_bytes == 0
    assert all(ref() is None for ref in pages)
    assert runner._fused is None
    with pytest.raises(RuntimeError, match="shut down: make a new one, or patch the model again"):
        engine.generate([[1, 2]])


def test_no_memory_is_taken_before_the_first_call(tiny_llama):
    hf_accel.patch(tiny_llama, **CONFIG)
    assert patch_module._patched[tiny_llama].engine is None


def test_sleep_and_wake_of_a_patched_model(tiny_llama):
    expected = tokens(tiny_llama)
    hf_accel.patch(tiny_llama, **CONFIG)
    assert tokens(tiny_llama) == expected
    engine = hf_accel.get_engine(tiny_llama)
    engine.sleep()
    assert engine.core.executor.runner.pool.num_bytes == 0
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(-1)  # as a training phase between two rollouts
    assert tokens(tiny_llama) == tokens(copy.deepcopy(tiny_llama)) != expected
