"""The weight version: one test for each way weights can change, and for what must not look like a change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_accel.engine.weights import WeightTracker

from .ways import DataSGD


def _backward(model: nn.Module) -> None:
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


OPTIMIZERS = {
    "sgd-loop": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "custom-data": lambda parameters: DataSGD(parameters, 1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_step(tiny_llama, kind):
    tracker = WeightTracker(tiny_llama)
    optimizer = OPTIMIZERS[kind](tiny_llama.parameters())
    _backward(tiny_llama)
    before = tracker.version()
    optimizer.step()
    assert tracker.version() != before


def test_optimizer_step_that_the_fingerprint_cannot_see(tiny_llama):
    tracker = WeightTracker(tiny_llama)
    optimizer = torch.optim.AdamW([tiny_llama.lm_head.weight], lr=0.0, weight_decay=0.0, fused=True)
    _backward(tiny_llama)
    before = tracker.version()
    optimizer.step()  # writes the same values: only the hook knows of it
    assert tracker.version() != before


def test_optimizer_over_a_flat_view_of_the_storage(tiny_llama):
    tracker = WeightTracker(tiny_llama)
    flat = nn.Parameter(tiny_llama.lm_head.weight.data.view(-1))
    flat.grad = torch.zeros_like(flat)
    before = tracker.version()
    torch.optim.AdamW([flat], lr=0.0, weight_decay=0.0, fused=True).step()
    assert tracker.version() != before


def test_optimizer_of_another_model_is_not_counted(tiny_llama):
    tracker = WeightTracker(tiny_llama)
    other = copy.deepcopy(tiny_llama)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True)
    _backward(other)
    before = tracker.version()
    optimizer.step()
    assert tracker.version() == before


def _write_data_add(model):
    model.model.layers[1].mlp.up_proj.weight.data.add_(1e-4)


def _write_data_assign(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.clone()


def _write_data_transpose(model):
    weight = model.model.layers[0].self_attn.q_proj.weight  # square: same address, same size
    weight.data = weight.data.T


def _write_no_grad(model):
    with torch.no_grad():
        model.model.norm.weight[5].add_(1)


def _write_inference_mode(model):
    with torch.inference_mode():
        model.model.layers[0].mlp.down_proj.weight.view(-1)[33].add_(1)


def _write_detach(model):
    model.lm_head.weight.detach()[7, 7] = 0


def _write_numpy(model):
    model.lm_head.weight.detach().numpy()[:] += 1


def _load_state_dict(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def _load_state_dict_assign(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _write_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(1.5)


def _write_buffer_data(model):
    model.model.rotary_emb.inv_freq.data.mul_(1.5)


def _register_buffer(model):
    model.model.rotary_emb.register_buffer("inv_freq", model.model.rotary_emb.inv_freq.clone())


def _replace_module(model):
    model.model.layers[0].mlp.gate_proj = copy.deepcopy(model.model.layers[0].mlp.gate_proj)


def _replace_activation(model):
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def _replace_parameter(model):
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach())


def _remove_layer(model):
    del model.model.layers[1]


def _swap_layers(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


WRITES = [
    _write_data_add,
    _write_data_assign,
    _write_data_transpose,
    _write_no_grad,
    _write_inference_mode,
    _write_detach,
    _write_numpy,
    _load_state_dict,
    _load_state_dict_assign,
    _write_buffer,
    _write_buffer_data,
    _register_buffer,
    _replace_module,
    _replace_activation,
    _replace_parameter,
    _remove_layer,
    _swap_layers,
    lambda model: model.to(torch.bfloat16),
    lambda model: model.half(),
    lambda model: model.resize_token_embeddings(300),
]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_write(tiny_llama, write):
    tracker = WeightTracker(tiny_llama)
    before = tracker.version()
    write(tiny_llama)
    after = tracker.version()
    assert after != before
    assert tracker.version() == after, "a change must be counted once"


@pytest.mark.parametrize("native", [True, False])
def test_data_write_to_each_parameter(tiny_llama, native, monkeypatch):
    if not native:
        monkeypatch.setattr("hf_accel_kernels.fingerprint._native", lambda: None)
    tracker = WeightTracker(tiny_llama)
    seen = {tracker.weights_version()}
    for tensor in [*tiny_llama.parameters(), *tiny_llama.buffers()]:
        tensor.data.mul_(1.01)
        seen.add(tracker.weights_version())
    assert len(seen) == 1 + len([*tiny_llama.parameters(), *tiny_llama.buffers()])


def test_inference_tensors(tiny_llama):
    with torch.inference_mode():
        model = copy.deepcopy(tiny_llama)
    tracker = WeightTracker(model)
    before = tracker.version()
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
        assert tracker.version() == before
        model.lm_head.weight.add_(1)
    assert tracker.version() != before


def test_writing_the_old_values_back_is_a_new_version(tiny_llama):
    tracker = WeightTracker(tiny_llama)
    first = tracker.version()
    weight = tiny_llama.lm_head.weight
    old = weight.data.clone()
    weight.data.add_(1)
    second = tracker.version()
    weight.data.copy_(old)
    assert tracker.version() not in (first, second)


def test_invalidate(tiny_llama):
    tracker = WeightTracker(tiny_llama)
    before = tracker.version(), tracker.weights_version()
    tracker.invalidate()
    after = tracker.version(), tracker.weights_version()
    assert before[0] != after[0] and before[1] != after[1]


def _zero_grad(model):
    _backward(model)
    model.zero_grad()


NOT_CHANGES = [
    lambda model: model(input_ids=torch.tensor([[1, 2, 3]])),
    lambda model: model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False),
    lambda model: model.train().eval(),
    lambda model: model.requires_grad_(False),
    lambda model: (_backward(model), _backward(model)),
    _zero_grad,
    lambda model: model.state_dict(),
    lambda model: copy.deepcopy(model),
    lambda model: model.gradient_checkpointing_enable(),
    lambda model: model.register_forward_hook(lambda *args: None),
]


@pytest.mark.parametrize("action", NOT_CHANGES)
def test_nothing_changed(tiny_llama, action):
    tracker = WeightTracker(tiny_llama)
    before = tracker.version(), tracker.weights_version()
    action(tiny_llama)
    assert (tracker.version(), tracker.weights_version()) == before


def test_tied_and_cyclic_trees():
    layer = nn.Linear(3, 3)
    root = nn.Sequential(layer, layer)
    layer.add_module("parent", root)
    tracker = WeightTracker(root)
    before = tracker.version()
    assert tracker.version() == before
    layer.bias.data.add_(1)
    assert tracker.version() != before


def test_odd_parameters():
    """Empty, scalar, meta, sparse, non-contiguous, complex and 8-bit tensors are watched as far as they can be."""
    root = nn.Module()
    root.empty = nn.Parameter(torch.empty(0, 3))
    root.scalar = nn.Parameter(torch.tensor(1.0))
    root.meta = nn.Parameter(torch.empty(4, device="meta"))
    root.register_buffer("sparse", torch.eye(3).to_sparse())
    root.register_buffer("strided", torch.randn(9, 9)[:, ::2])
    root.register_buffer("complex", torch.randn(5, dtype=torch.complex64))
    root.register_buffer("flags", torch.tensor([True, False, True]))
    root.register_buffer("fp8", torch.randn(40).to(torch.float8_e4m3fn))
    tracker = WeightTracker(root)
    before = tracker.version()
    assert tracker.version() == before
    for tensor in (root.scalar.data, root.strided.data, root.complex.data):
        tensor.add_(1)
        assert tracker.version() != before
        before = tracker.version()
    root.flags.data.logical_not_()
    assert tracker.version() != before
    before = tracker.version()
    root.fp8.data.view(torch.uint8).zero_()
    assert tracker.version() != before
