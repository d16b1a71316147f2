"""Latent attention over expanded keys and values: the kernel against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from hf_accel_kernels import mla_reference
from hf_accel_kernels.triton_ops import mla_prefill

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "length"), [(1, 1), (5, 200), (130, 130), (33, 70)])
@pytest.mark.parametrize(("nope", "rope", "v"), [(128, 64, 128), (24, 8, 16), (33, 3, 50), (16, 0, 7)])
def test_a_chunk_after_its_prefix(num_tokens, length, nope, rope, v, dtype, device):
    num_heads, rank = 2, 20
    latents, weight = torch.randn(length, rank), torch.randn(num_heads * (nope + v), rank) / rank**0.5
    kv = (latents @ weight.T).to(dtype)
    rope_key = torch.randn(length, rope + 2).to(dtype)[:, 2:]  # rows with gaps
    q = torch.randn(num_tokens, num_heads, nope + rope + 1).to(dtype)[:, :, 1:]
    scale = (nope + rope) ** -0.5
    # The oracle takes latents: an identity makes it take the very keys and values.
    width = num_heads * (nope + v)
    expected = mla_reference.expanded_attention(q, kv, rope_key, torch.eye(width), nope, scale)
    got = mla_prefill.expanded_attention(q.to(device), kv.to(device), rope_key.to(device), scale, nope)
    assert got.shape == (num_tokens, num_heads, v) and got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=torch.finfo(dtype).eps)


def test_what_is_beyond_the_chunk_is_not_read(device):
    """Memory behind the last key holds NaN; queries that stand alone in their block see no later key."""
    q, kv, rope_key = torch.randn(3, 2, 24), torch.full((9, 64), float("nan")), torch.full((9, 8), float("nan"))
    kv[:5], rope_key[:5] = torch.randn(5, 64), torch.randn(5, 8)
    tensors = [t.to(device) for t in (q, kv[:5], rope_key[:5])]
    got = mla_prefill.expanded_attention(*tensors, 0.2, 16)
    alone = mla_prefill.expanded_attention(tensors[0][:1], tensors[1][:3], tensors[2][:3], 0.2, 16)
    assert got.isfinite().all()
    torch.testing.assert_close(got[:1], alone, atol=1e-6, rtol=0)
