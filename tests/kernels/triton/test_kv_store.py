"""The store of keys and values: the kernel and the torch form against the oracle, to the bit."""

from __future__ import annotations

import pytest
import torch

from hf_accel_kernels import ops, reference, torch_attention
from hf_accel_kernels.triton_ops import kv_store as kernel

from .paged_stores import FP8, assert_same_pages, make_pages, make_slots

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("form", [kernel.store_kv, torch_attention.store_kv])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "dim", "v_dim", "page_size"), [(1, 1, 1, 1), (3, 40, 17, 5), (2, 128, 128, 16), (33, 64, 128, 8)]
)
def test_store(form, dtype, fp8, num_heads, dim, v_dim, page_size, device):
    num_tokens = 9
    scale = torch.rand(num_tokens, num_heads, 1) * 100
    k = (torch.randn(num_tokens, num_heads, dim + 3) * scale).to(dtype)[..., :dim]
    v = torch.randn(v_dim, num_heads, num_tokens).to(dtype).permute(2, 1, 0)  # last axis strided
    k[2] = 0
    k[4, 0, 0], k[5, -1, -1] = float("inf"), float("nan")
    expected, got = make_pages(num_heads, dim, v_dim, page_size, FP8 if fp8 else dtype, device)
    slots = make_slots(num_tokens, page_size)
    reference.store_kv(k, v, *expected[:2], slots, k_scales=expected[2], v_scales=expected[3])
    form(k.to(device), v.to(device), *got[:2], slots.to(device), *got[2:])
    assert_same_pages(got, expected)


def test_every_fp8_value_and_its_neighbourhood_is_rounded_as_torch_does(device):
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    finite = every[~every.isnan()].sort().values
    between = (finite[:-1] + finite[1:]) / 2
    up, down = torch.tensor(1e9), torch.tensor(-1e9)
    values = torch.cat([finite, between, between.nextafter(up), between.nextafter(down), torch.randn(900) * 100]).clamp(
        -448, 448
    )
    rows = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    rows = torch.cat([rows, torch.full((len(rows), 1), 448.0)], dim=1)[:, None]  # their largest magnitude: scales of 1
    _, got = make_pages(1, 256, 256, 4, FP8, device, num_pages=len(rows))
    slots = torch.arange(len(rows))
    kernel.store_kv(rows.to(device), rows.to(device), *got[:2], slots.to(device), *got[2:])
    stored = got[0].cpu()[slots // 4, 0, slots % 4]
    assert torch.equal(stored.view(torch.uint8) & 0x7F, rows[:, 0].to(FP8).view(torch.uint8) & 0x7F)
    assert torch.equal(stored.float(), rows[:, 0].to(FP8).float())
    assert (got[2].cpu()[slots // 4, 0, slots % 4] == 1).all()


def test_bad_input_is_refused():
    k, slots = torch.zeros(3, 2, 8), torch.zeros(3, dtype=torch.int64)
    pages, fp8 = torch.zeros(4, 2, 4, 8), torch.zeros(4, 2, 4, 8).to(FP8)
    scales = torch.zeros(4, 2, 4)
    for arguments, scale_pair, message in (
        ((k[:2], k, pages, pages, slots), (None, None), "must be"),
        ((k, k, pages.half(), pages.half(), slots), (None, None), "share one dtype"),
        ((k, k, pages, pages, slots.int()), (None, None), "slots int64"),
        ((k, k, fp8, fp8, slots), (None, None), "only they"),
        ((k, k, pages, pages, slots), (scales, scales), "only they"),
        ((k, k, fp8, fp8, slots), (scales, None), "only they"),
        ((k, k, fp8, fp8, slots), (scales, scales.half()), "scales must"),
        ((k, k, fp8, fp8, slots), (scales, scales[:1]), "scales must"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.store_kv(*arguments, k_scales=scale_pair[0], v_scales=scale_pair[1])
