"""The loop over layers for devices, run on CPU: its logits are HF's, for every family, whatever happens to the weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_accel.attention.base import AttentionMetadata

from .fused_models import MODELS, VOCAB, DeviceSteps, Pages, fused_logits, make, on_device


def sequences() -> list[torch.Tensor]:
    return [torch.randint(0, VOCAB, (length,)) for length in (26, 9, 18)]


def assert_same(steps: DeviceSteps, model: nn.Module, tolerance: float = 1e-5) -> None:
    batch = sequences()
    for logits, ids in zip(fused_logits(steps, model, batch), batch):
        with torch.no_grad():
            expected = model(ids.unsqueeze(0)).logits[0].float()
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_the_models_own_forward(name: str) -> None:
    model = make(name)
    assert_same(DeviceSteps(on_device(model)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama tied, biased", "qwen3", "smollm3", "granite"])
def test_half_precision_differs_by_rounding_only(name: str, dtype: torch.dtype) -> None:
    model, wide = make(name, dtype), make(name).to(dtype).float()
    batch = sequences()
    for logits, ids in zip(fused_logits(DeviceSteps(on_device(model)), model, batch), batch):
        with torch.no_grad():
            exact, own = wide(ids.unsqueeze(0)).logits[0], model(ids.unsqueeze(0)).logits[0].float()
        assert (logits - exact).norm() < 1.5 * (own - exact).norm() + 1e-3 * exact.norm()
        assert torch.equal(logits, logits.to(dtype).float())


def test_only_the_wanted_rows_get_logits() -> None:
    model, ids = make("qwen3"), sequences()[:1]
    steps, pages = DeviceSteps(on_device(model)), Pages(make("qwen3"), ids)
    everything = pages.step(steps, [26])
    positions, slots = torch.arange(26), pages.table[0].long()[torch.arange(26) // 4] * 4 + torch.arange(26) % 4
    lens, starts = torch.tensor([26]).int(), torch.tensor([0, 26]).int()
    for wanted in ([3, 25], []):
        rows = torch.tensor(wanted, dtype=torch.int64)
        arguments = (ids[0], positions, slots, pages.table, lens, starts, rows, pages.k_pages, pages.v_pages)
        torch.testing.assert_close(steps.forward(*arguments), everything[rows], rtol=1e-4, atol=1e-4)


class ShapesOnly:
    """Stands for a backend where nothing is computed."""

    def attend(self, q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        return torch.empty_like(q)


@pytest.mark.parametrize("name", ["llama tied, biased", "qwen3", "smollm3", "granite"])
def test_a_step_depends_on_no_data_of_the_device(name: str) -> None:
    """On tensors without data whatever would wait for the device raises: a step can be captured in a graph."""
    model = make(name).to("meta")
    device_forward, ids = on_device(model), torch.zeros(5, dtype=torch.int64, device="meta")
    rows = torch.zeros(2, dtype=torch.int32, device="meta")
    metadata = AttentionMetadata(rows[None], rows, rows, ids, (2, 3), (2, 3))
    pages = Pages(make(name), [torch.zeros(1)])
    pools = [[page.to("meta") for page in pool] for pool in (pages.k_pages, pages.v_pages)]
    with torch.no_grad():
        logits = device_forward.forward(ids, ids, ids[:2], ShapesOnly(), metadata, *pools)
    assert logits.shape == (2, VOCAB) and logits.dtype == torch.float32


def test_negative_slots_store_nothing() -> None:
    model = make()
    steps, pages = DeviceSteps(on_device(model)), Pages(model, [torch.zeros(1, dtype=torch.int64)])
    before = [page.clone() for page in (*pages.k_pages, *pages.v_pages)]
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    starts = torch.tensor([0, 1]).int()
    steps.forward(zero, zero, zero - 1, pages.table, one, starts, zero, pages.k_pages, pages.v_pages)
    assert all(torch.equal(a, b) for a, b in zip((*pages.k_pages, *pages.v_pages), before, strict=True))


def test_rope_tables_grow_with_the_sequence() -> None:
    model = make()
    device_forward = on_device(model, max_positions=5)
    layout = device_forward.layout_version
    assert_same(DeviceSteps(device_forward), model)
    assert device_forward.layout_version != layout


def test_a_deleted_model_is_freed() -> None:
    model = make()
    device_forward, ref = on_device(model), weakref.ref(model)
    gc.collect()
    del model
    gc.collect()
    assert ref() is None
    assert device_forward.refresh() == "the model is gone"
    device_forward.close()


@pytest.mark.parametrize("name", ["llama tied, biased", "qwen3"])
def test_writes_in_place_need_no_refresh(name: str) -> None:
    model = make(name)
    device_forward, ids = on_device(model), sequences()
    steps = DeviceSteps(device_forward)
    stale = fused_logits(steps, model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter))
    assert_same(steps, model)
    assert (fused_logits(steps, model, ids)[0] - stale[0]).abs().max() > 1e-2
    layout = device_forward.layout_version
    assert device_forward.refresh() == "" and device_forward.layout_version == layout
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert device_forward.refresh() == "" and device_forward.layout_version != layout


@pytest.mark.parametrize("way", ["data", "parameter", "state_dict"])
def test_refresh_follows_other_memory(way: str) -> None:
    model = make("llama tied, biased", tie_word_embeddings=False)
    device_forward = on_device(model)
    held = [group.tensor.data_ptr() for fused in device_forward._fused for group in fused.values()]
    if way == "state_dict":
        model.load_state_dict({k: v + torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
    else:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and way == "data":
                    parameter.data = parameter.data + torch.randn_like(parameter)
                elif parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.randn_like(parameter))
    assert device_forward.refresh() == ""
    assert_same(DeviceSteps(device_forward), model)
    assert held == [group.tensor.data_ptr() for fused in device_forward._fused for group in fused.values()]
    assert not any(group.strays() for fused in device_forward._fused for group in fused.values())
