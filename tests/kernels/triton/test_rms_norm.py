"""RMSNorm, with and without the residual sum: the kernel and the torch form against the oracle, and against HF's module."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_accel_kernels import reference_elementwise as reference
from hf_accel_kernels import rms_norm
from hf_accel_kernels.triton_ops import rms_norm as kernel

from .rounding import DTYPES, assert_rounded_alike

EPS = 1e-5
SHAPES = [(3, 1), (5, 48), (2, 1000), (1, 16384), (2, 20001), (0, 64)]


def inputs(num_tokens, size, dtype):
    wide = torch.randn(num_tokens, 2 * size + 3) * torch.rand(num_tokens, 1).exp2() * 4
    x, residual = wide.to(dtype)[:, :size], wide.to(dtype)[:, size + 3 :]
    return x, residual, (torch.rand(size) + 0.5).to(dtype)


@pytest.mark.parametrize("form", [kernel.rms_norm, rms_norm._rms_norm_in_torch, rms_norm.rms_norm])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), SHAPES)
def test_rms_norm(form, dtype, num_tokens, size, device):
    x, _, weight = inputs(num_tokens, size, dtype)
    got = form(x.to(device), weight.to(device), EPS)
    assert got.is_contiguous()
    assert_rounded_alike(got, reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("form", [kernel.add_rms_norm, rms_norm._add_rms_norm_in_torch])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_add_rms_norm(form, dtype, num_tokens, size, scale, device):
    x, residual, weight = inputs(num_tokens, size, dtype)
    kept = x.clone(), residual.clone()
    normed, total = form(x.to(device), residual.to(device), weight.to(device), EPS, scale)
    expected_normed, expected_total = reference.add_rms_norm(x, residual, weight, EPS, scale=scale)
    assert torch.equal(total.cpu(), expected_total)
    assert_rounded_alike(normed, expected_normed)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_form_is_hfs_to_the_bit(dtype):
    x, residual, weight = inputs(40, 96, dtype)
    norm = LlamaRMSNorm(96, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        assert torch.equal(rms_norm.rms_norm(x, weight, EPS), norm(x))
        normed, total = rms_norm.add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, residual + x) and torch.equal(normed, norm(residual + x))
        normed, total = rms_norm.add_rms_norm(x, residual, weight, EPS, scale=0.22)
        assert torch.equal(total, residual + x * 0.22) and torch.equal(normed, norm(total))


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 8), torch.zeros(8), "x must"),
        (torch.zeros(8, 2).T, torch.zeros(2, 8), torch.zeros(8), "x must"),
        (torch.zeros(2, 8), torch.zeros(2, 7), torch.zeros(8), "residual must"),
        (torch.zeros(2, 8), torch.zeros(8, 2).T, torch.zeros(8), "residual must"),
        (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(7), "weight must"),
        (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(8).half(), "weight must"),
    ],
)
def test_bad_input_is_refused(x, residual, weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm.add_rms_norm(x, residual, weight, EPS)
