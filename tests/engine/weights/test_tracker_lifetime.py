"""A tracker keeps nothing alive, and its optimizer hook goes when the last one goes."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

import hf_accel
from hf_accel import Engine
from hf_accel.engine import weights
from hf_accel.engine.weights import WeightTracker

# -- lifetime --


def test_tracker_does_not_keep_the_model_or_its_weights_alive(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    tracker = WeightTracker(model)
    tracker.version()
    refs = [weakref.ref(model), weakref.ref(model.lm_head.weight), weakref.ref(model.model.layers[0])]
    gc.collect()
    gc.disable()
    try:
        del model
        gc.collect()  # a module tree may be cyclic by itself
        assert [ref() for ref in refs] == [None] * 3
        tracker_ref = weakref.ref(tracker)
        with pytest.raises(RuntimeError, match="no longer exists"):
            tracker.version()
        del tracker
        assert tracker_ref() is None, "the tracker must be freed without the cycle collector"
    finally:
        gc.enable()


def test_old_storage_is_freed_when_weights_are_replaced(tiny_llama):
    tracker = WeightTracker(tiny_llama)
    tracker.version()
    old = weakref.ref(tiny_llama.lm_head.weight.untyped_storage())
    old_parameter = weakref.ref(tiny_llama.lm_head.weight)
    tiny_llama.lm_head.weight = nn.Parameter(torch.zeros(256, 64))
    gc.collect()
    assert old() is None and old_parameter() is None


@pytest.fixture
def no_other_trackers():
    """Engines that other tests still hold do not listen meanwhile. Gives torch's table of global hooks."""
    gc.collect()
    others = [tracker for ref in weights._TRACKERS if (tracker := ref()) is not None]
    for tracker in others:
        weights._unwatch_optimizers(tracker)
    assert weights._after_optimizer_step not in _global_optimizer_post_hooks.values()
    yield _global_optimizer_post_hooks
    for tracker in others:
        weights._watch_optimizers(tracker)


def test_optimizer_hook_is_installed_once_and_removed_with_the_last_tracker(tiny_llama, no_other_trackers):
    installed = no_other_trackers.values()
    WeightTracker(tiny_llama).close()
    assert weights._after_optimizer_step not in installed
    first, second = WeightTracker(tiny_llama), WeightTracker(tiny_llama)
    assert list(installed).count(weights._after_optimizer_step) == 1
    first.close()
    assert weights._after_optimizer_step in installed
    second.close()
    assert weights._after_optimizer_step not in installed


@pytest.mark.parametrize("patched", [False, True])
def test_optimizer_hook_goes_with_the_last_engine_that_is_collected(tiny_llama, no_other_trackers, patched):
    before = dict(no_other_trackers)
    engines = [Engine(copy.deepcopy(tiny_llama), num_pages=8) for _ in range(2)]
    model = hf_accel.patch(copy.deepcopy(tiny_llama), num_pages=8)
    if patched:
        model.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=2)
    engines.pop()
    gc.collect()
    assert weights._after_optimizer_step in no_other_trackers.values()
    engines.pop()
    gc.collect()
    assert (weights._after_optimizer_step in no_other_trackers.values()) is patched
    del model
    gc.collect()
    assert dict(no_other_trackers) == before


def test_a_tracker_is_collected_while_torch_walks_the_hooks(tiny_llama, no_other_trackers):
    """Torch iterates over the table itself: it must not change while another's hook runs."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    trackers, num_steps = [WeightTracker(tiny_llama)], []

    def collect(*args):
        trackers.clear()
        gc.collect()
        num_steps.append(1)

    other = register_optimizer_step_post_hook(collect)
    no_other_trackers.move_to_end(other.id, last=False)  # before ours
    try:
        torch.optim.SGD([parameter], lr=0.1).step()
        assert not weights._TRACKERS and num_steps == [1]
    finally:
        other.remove()
    WeightTracker(tiny_llama)
    assert not no_other_trackers, "the next tracker takes over the hook that stayed"


def test_a_tracker_is_collected_during_our_own_hook(tiny_llama, no_other_trackers, monkeypatch):
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    trackers = [WeightTracker(tiny_llama)]
    monkeypatch.setattr(WeightTracker, "_on_optimizer_step", lambda self, optimizer: trackers.clear())
    torch.optim.SGD([parameter], lr=0.1).step()
    gc.collect()
    assert not trackers and not no_other_trackers
