"""The store of latents: the kernel against the oracle, to the bit."""

from __future__ import annotations

import pytest
import torch

from hf_accel_kernels import mla_reference
from hf_accel_kernels.triton_ops import mla_store as kernel

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("rank", "rope", "page_size"), [(16, 8, 1), (40, 7, 8), (512, 64, 16), (33, 0, 5)])
def test_rows_and_scales(rank, rope, page_size, fp8, dtype, device):
    num_tokens, num_pages = 30, 70
    latent = (torch.randn(num_tokens, rank + 5) * torch.rand(num_tokens, 1) * 100).to(dtype)[:, :rank]
    rope_key = torch.randn(rope, num_tokens).to(dtype).T  # last dimension strided
    latent[7] = 0
    latent[11, 3] = float("inf")
    if rope:
        rope_key[9, 1] = float("nan")
    slots = torch.randperm(num_pages * page_size)[:num_tokens]
    slots[[3, 20]] = -1
    pages = torch.full((num_pages, page_size, rank + rope), 9.0).to(FP8 if fp8 else dtype)
    scales = torch.full((num_pages, page_size, 2), 9.0) if fp8 else None
    expected, expected_scales = pages.clone(), None if scales is None else scales.clone()
    mla_reference.mla_store(latent, rope_key, expected, slots, expected_scales)
    got, got_scales = pages.to(device), None if scales is None else scales.to(device)
    kernel.mla_store(latent.to(device), rope_key.to(device), got, slots.to(device), got_scales)
    torch.testing.assert_close(got.cpu().float(), expected.float(), atol=0, rtol=0, equal_nan=True)
    if fp8:
        torch.testing.assert_close(got_scales.cpu(), expected_scales, atol=0, rtol=0, equal_nan=True)


def test_every_fp8_value_and_its_neighbourhood_is_rounded_as_torch_does(device):
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    finite = every[~every.isnan()]
    between = (finite[:-1] + finite[1:]) / 2
    values = torch.cat([finite, between, between.nextafter(torch.tensor(1e9)), between.nextafter(torch.tensor(-1e9))])
    values = torch.cat([values, torch.randn(3000) * 100, torch.randn(3000) / 100]).clamp(-448, 448)
    rows = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    rows = torch.cat([rows, torch.full((len(rows), 1), 448.0)], dim=1).to(device)  # the largest magnitude: a scale of 1
    pages, scales = torch.empty(len(rows), 1, 256, device=device).to(FP8), torch.empty(len(rows), 1, 2, device=device)
    kernel.mla_store(rows, rows[:, :0], pages, torch.arange(len(rows), device=device), scales)
    assert torch.equal(pages[:, 0].view(torch.uint8) & 0x7F, rows.to(FP8).view(torch.uint8) & 0x7F)
    assert torch.equal(pages[:, 0].float(), rows.to(FP8).float()) and (scales == 1).all()
