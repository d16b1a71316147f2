"""Head norms, rotation and store in one pass: the kernel and the torch form against the oracle and HF's functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from hf_accel_kernels import reference_elementwise as reference
from hf_accel_kernels import rope_and_store as op
from hf_accel_kernels.triton_ops import rope_and_store as kernel

from .paged_stores import FP8, Pages, assert_same_pages, make_pages, make_slots
from .rounding import DTYPES, assert_rounded_alike

NUM_TOKENS, MAX_POSITIONS, PAGE_SIZE = 4, 50, 5
SHAPES = {  # num_heads, num_kv_heads, head_dim, v_head_dim, rotary_dim (0: no rotation)
    "gqa": (6, 2, 16, 16, 16), "narrow rotation": (3, 1, 40, 40, 20), "other values": (4, 4, 24, 17, 24), "none": (5, 1, 7, 7, 0),
    "wide": (12, 3, 128, 128, 128), "many": (17, 17, 80, 80, 64),
}  # fmt: skip


class Inputs:
    """Fresh random arguments of one call."""

    def __init__(self, shape: str, dtype: torch.dtype, *, norm: bool, fp8: bool, device: torch.device) -> None:
        num_heads, num_kv_heads, dim, v_dim, rotary = SHAPES[shape]
        if dim == v_dim:
            packed = torch.randn(NUM_TOKENS, (num_heads + 2 * num_kv_heads) * dim).to(dtype)
            self.heads = op.split_qkv(packed, num_heads, num_kv_heads, dim)
        else:
            wide = torch.randn(NUM_TOKENS, 3, num_heads, dim + 3).to(dtype)
            self.heads = (wide[:, 0, :, :dim], wide[:, 1, :num_kv_heads, :dim], wide[:, 2, :num_kv_heads, :v_dim])
        self.positions = torch.randint(0, MAX_POSITIONS, (NUM_TOKENS,))
        angles = torch.rand(MAX_POSITIONS, rotary) * 6
        self.tables = (angles.cos() * 1.1, angles.sin() * 1.1) if rotary else (None, None)
        weights = [(torch.rand(dim) + 0.5).to(dtype) for _ in range(2)] if norm else [None, None]
        self.norms = (*weights, 1e-6)
        self.slots = make_slots(NUM_TOKENS, PAGE_SIZE)
        self.expected_pages, self.pages = make_pages(num_kv_heads, dim, v_dim, PAGE_SIZE, FP8 if fp8 else dtype, device)
        self.device = device

    def options(self, pages: Pages) -> dict[str, Any]:
        q_norm, k_norm, eps = self.norms
        return {"q_norm": q_norm, "k_norm": k_norm, "eps": eps, "k_scales": pages[2], "v_scales": pages[3]}

    def expect(self) -> torch.Tensor:
        rows = (*self.heads, self.positions, *self.tables, *self.expected_pages[:2], self.slots)
        return reference.rope_and_store(*rows, **self.options(self.expected_pages))

    def run(self, form: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        def there(*tensors: Any) -> list[Any]:
            return [t.to(self.device) if isinstance(t, torch.Tensor) else t for t in tensors]

        q, k, v = there(*self.heads)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        rows = there(self.positions, *self.tables, *self.pages[:2], self.slots, *self.norms, *self.pages[2:])
        form(q, k, v, *rows, out)
        return out


FORMS = pytest.mark.parametrize("form", [kernel.rope_and_store, op._in_torch])


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_store_are_right_to_the_bit(form, dtype, fp8, shape, device):
    inputs = Inputs(shape, dtype, norm=False, fp8=fp8, device=device)
    expected, got = inputs.expect(), inputs.run(form).cpu()
    if dtype == torch.float32 and device.type == "cuda":  # products and sums of float32 are fused there
        return torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(got, expected)
    assert_same_pages(inputs.pages, inputs.expected_pages)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["gqa", "narrow rotation", "none", "wide"])
def test_head_norms(form, dtype, shape, device):
    inputs = Inputs(shape, dtype, norm=True, fp8=False, device=device)
    expected, got = inputs.expect(), inputs.run(form)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]  # units of sums that cancel
    for a, b in ((got, expected), *zip(inputs.pages[:2], inputs.expected_pages[:2], strict=True)):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)
        assert dtype == torch.float32 or (a.cpu() != b).float().mean() < 0.01


@FORMS
def test_head_norms_before_fp8(form, device):
    inputs = Inputs("narrow rotation", torch.bfloat16, norm=True, fp8=True, device=device)
    assert_rounded_alike(inputs.run(form), inputs.expect())
    torch.testing.assert_close(inputs.pages[2].cpu(), inputs.expected_pages[2], rtol=1e-2, atol=0)
    differ = inputs.pages[0].cpu().float() != inputs.expected_pages[0].float()
    assert differ.float().mean() < 0.05


@FORMS
@pytest.mark.parametrize("norm", [False, True])
def test_queries_in_place(form, norm, device):
    inputs = Inputs("gqa", torch.bfloat16, norm=norm, fp8=False, device=device)
    inputs.heads = tuple(t.to(device) for t in inputs.heads)
    apart = inputs.run(form)
    inputs.run(form, out=inputs.heads[0])
    assert torch.equal(inputs.heads[0], apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_torch_form_is_hfs_to_the_bit(dtype, norm):
    device = torch.device("cpu")
    inputs = Inputs("gqa", dtype, norm=norm, fp8=False, device=device)
    q, k, v = inputs.heads
    if norm:
        norms = [Qwen3RMSNorm(q.shape[2], 1e-6).to(dtype) for _ in range(2)]
        for module, weight in zip(norms, inputs.norms[:2], strict=True):
            module.weight = torch.nn.Parameter(weight)
        q, k = norms[0](q).detach(), norms[1](k).detach()
    cos, sin = (table[inputs.positions].to(dtype)[None] for table in inputs.tables)
    q, k = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
    pages = inputs.pages
    rows = (*inputs.heads, inputs.positions, *inputs.tables, *pages[:2], inputs.slots)
    got = op.rope_and_store(*rows, **inputs.options(pages))
    assert torch.equal(got, q[0].transpose(0, 1))
    for token, slot in enumerate(inputs.slots.tolist()):
        if slot >= 0:
            assert torch.equal(pages[0][slot // PAGE_SIZE, :, slot % PAGE_SIZE], k[0, :, token])
            assert torch.equal(pages[1][slot // PAGE_SIZE, :, slot % PAGE_SIZE], v[token])


BAD = {
    "q must": {"q": torch.zeros(4, 6, 8)}, "positions must": {"positions": torch.zeros(4, dtype=torch.int32)},
    "given together": {"cos": None}, "even rotary_dim": {"cos": torch.zeros(50, 7), "sin": torch.zeros(50, 7)},
    "contiguous float32": {"cos": torch.zeros(50, 16).half(), "sin": torch.zeros(50, 16).half()},
    "norm weights": {"q_norm": torch.ones(15), "k_norm": torch.ones(15)}, "k_norm must": {"q_norm": torch.ones(16)},
    "out must": {"out": torch.zeros(4, 5, 16)}, "dense in the last": {"q": torch.zeros(16, 6, 4).permute(2, 1, 0)},
    "slots int64": {"slot_mapping": torch.zeros(4, dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    inputs = Inputs("gqa", torch.float32, norm=False, fp8=False, device=torch.device("cpu"))
    names = ("q", "k", "v", "positions", "cos", "sin", "k_pages", "v_pages", "slot_mapping")
    values = (*inputs.heads, inputs.positions, *inputs.tables, *inputs.pages[:2], inputs.slots)
    with pytest.raises(ValueError, match=message):
        op.rope_and_store(**(dict(zip(names, values, strict=True)) | BAD[message]))
