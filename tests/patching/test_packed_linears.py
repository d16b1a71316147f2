"""Packed linears answer as the modules do, during a step of their thread alone, and leave nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from hf_accel.patching.packed_linears import PackedLinears, is_plain_linear

pytestmark = pytest.mark.skipif(bool(PackedLinears.why_not()), reason=PackedLinears.why_not())


def _model(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 200), nn.GELU(), nn.Linear(200, 72, bias=False), nn.Linear(72, 8)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 5, 96), (3, 37, 96), (260, 96)])
def test_same_answers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model, x = _model(dtype), torch.randn(shape).to(dtype)
    packed = PackedLinears(model)
    with torch.no_grad():
        expected = model(x)
        with packed.on():
            assert "forward" in model[0].__dict__
            out = model(x)
    assert out.shape == expected.shape and out.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert all("forward" not in m.__dict__ for m in model)


def test_only_plain_linears_are_taken() -> None:
    class Special(nn.Linear):
        pass

    assert is_plain_linear(nn.Linear(64, 64))
    assert not is_plain_linear(nn.Linear(64, 8))
    assert not is_plain_linear(Special(64, 64))
    assert not is_plain_linear(nn.Linear(64, 64).half())
    assert not is_plain_linear(torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    own = nn.Linear(64, 64)
    own.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain_linear(own)


def test_weight_changes_are_followed_by_refresh() -> None:
    model, x = _model(torch.float32), torch.randn(4, 96)
    packed = PackedLinears(model)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        assert packed.refresh(model)
        with packed.on():
            torch.testing.assert_close(model(x), model(x.clone()))
            out = model(x)
        torch.testing.assert_close(out, model(x), atol=1e-5, rtol=1e-5)
    model[0] = nn.Linear(96, 200)
    assert not packed.refresh(model), "a replaced module must be packed anew"


def test_other_threads_and_autograd_see_the_plain_module() -> None:
    model, x = _model(torch.float32), torch.randn(4, 96)
    packed = PackedLinears(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # packed copies are stale now: whoever reads them gets another answer
        expected = model(x)
    seen: list[torch.Tensor] = []
    with packed.on():
        loss = model(x).sum()
        loss.backward()
        thread = threading.Thread(target=lambda: seen.append(model(x).detach()))
        thread.start()
        thread.join()
    assert model[0].weight.grad is not None
    torch.testing.assert_close(seen[0], expected)
