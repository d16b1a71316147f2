"""Merging two attentions: the kernel and the torch form against the oracle, and against attention over the whole."""

from __future__ import annotations

import pytest
import torch

from hf_accel_kernels import merge_state as contract
from hf_accel_kernels import reference
from hf_accel_kernels.testing import make_paged_case
from hf_accel_kernels.triton_ops import merge_state as kernel
from hf_accel_kernels.triton_ops.paged_decode import paged_decode

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("form", [kernel.merge_state, contract._merge_in_torch])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 96), (2, 71, 130)], ids=str)
def test_merge(form, dtype, shape, device):
    wide = torch.randn(2, shape[0], shape[1] + 2, shape[2] + 3).to(device, dtype)
    out_a, out_b = wide[0, :, 1:-1, : shape[2]], wide[1, :, 1:-1, : shape[2]]  # dense in the last axis only
    lse_a, lse_b = (torch.randn(2, *shape[1::-1]) * 30).to(device).transpose(1, 2)
    lse_a[0, 0] = lse_b[-1, -1] = -torch.inf  # a part without keys
    if shape[0] > 1:
        lse_a[1] = lse_b[1] = -torch.inf
    out, lse = form(out_a, lse_a, out_b, lse_b)
    expected_out, expected_lse = reference.merge_state(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out, expected_out, atol=TOLERANCE[dtype], rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-6)


def test_prefix_and_rest_merge_to_the_whole(device):
    """Decode rows: the first pages and the later ones attended apart; the sink is in one part."""
    case = make_paged_case((1, 1, 1), (50, 33, 41), num_kv_heads=2, group=3, head_dim=40, page_size=8, device=device)
    prefix, parts = 32, []
    for table, lens, sinks in (
        (case.page_table, torch.full_like(case.seq_lens, prefix), None),
        (case.page_table[:, prefix // 8 :].contiguous(), case.seq_lens - prefix, case.sinks),
    ):
        out, lse = torch.empty(case.q.shape, device=device), torch.empty(case.q.shape[:2], device=device)
        pages = (case.k_pages, case.v_pages, None, None)
        options = {"sliding_window": 0, "softcap": 0.0, "sinks": sinks, "max_seq_len": 50, "out": out, "out_lse": lse}
        paged_decode(case.q, *pages, table, lens, case.scale, **options)
        parts += [out, lse]
    expected_lse = torch.empty(case.q.shape[:2], device=device)
    expected = reference.paged_attention(*case.arguments(), case.scale, sinks=case.sinks, out_lse=expected_lse)
    for form in (kernel.merge_state, contract.merge_state):
        out, lse = form(*parts)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-6)


def test_bad_input_is_refused():
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for arguments in (
        (out, lse, out[:1], lse),
        (out, lse, out.half(), lse),
        (out, lse[:, :2], out, lse),
        (out, lse, out, lse.double()),
        (out.transpose(1, 2), lse, out.transpose(1, 2), lse),
        (out.int(), lse, out.int(), lse),
        (torch.zeros(2, 4, 3).transpose(1, 2), lse, out, lse),
    ):
        with pytest.raises(ValueError, match="must be"):
            contract.merge_state(*arguments)
