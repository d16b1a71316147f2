"""The gated activation: the kernel and the torch form against the oracle, and against HF's MLP."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from hf_accel_kernels import reference_elementwise as reference
from hf_accel_kernels import swiglu
from hf_accel_kernels.triton_ops import swiglu as kernel

from .rounding import DTYPES, assert_rounded_alike


@pytest.mark.parametrize("form", [kernel.swiglu, swiglu._swiglu_in_torch, swiglu.swiglu])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 80), (2, 1024), (5, 2309), (0, 8)])
def test_swiglu(form, dtype, num_tokens, size, device):
    gate_up = (torch.randn(num_tokens, 2 * size + 5) * 4).to(dtype)[:, : 2 * size]
    got = form(gate_up.to(device))
    assert got.is_contiguous()
    assert_rounded_alike(got, reference.swiglu(gate_up))


def test_extremes(device):
    gate = torch.tensor([[-1e4, -200.0, -0.0, 0.0, 200.0, 1e4, float("inf"), float("nan")]])
    got = kernel.swiglu(torch.cat([gate, torch.full_like(gate, 2.0)], dim=1).to(device)).cpu()
    expected = torch.nn.functional.silu(gate) * 2
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_form_is_hfs_to_the_bit(dtype):
    gate, up = torch.randn(2, 7, 65).to(dtype).unbind()
    assert torch.equal(swiglu.swiglu(torch.cat([gate, up], dim=1)), ACT2FN["silu"](gate) * up)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 7), torch.zeros(8, 2).T, torch.zeros(2, 8).double(), torch.zeros(2, 2, 8)]
)
def test_bad_input_is_refused(bad):
    with pytest.raises(ValueError, match="gate_up must be floats"):
        swiglu.swiglu(bad)
