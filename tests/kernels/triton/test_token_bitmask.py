"""Token masks: the kernel and the torch form against the oracle."""

from __future__ import annotations

import pytest
import torch

from hf_accel_kernels import reference, token_bitmask
from hf_accel_kernels.triton_ops import token_bitmask as kernel


def copied(logits, bitmask, mask_rows):
    """The form that makes a copy, as one that writes in place."""
    before = logits.clone()
    result = token_bitmask.masked(logits, bitmask, mask_rows)
    assert torch.equal(logits, before)
    logits.copy_(result)


FORMS = [kernel.apply_token_bitmask, token_bitmask._apply_in_torch, token_bitmask.apply_token_bitmask, copied]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "vocab_size", "num_words"), [(1, 31, 1), (3, 5003, 157), (2, 4200, 128)])
@pytest.mark.parametrize("named", [True, False])
def test_forbidden_tokens_become_minus_infinity(form, dtype, num_rows, vocab_size, num_words, named, device):
    num_masks = 5 if named else num_rows
    bitmask = torch.randint(-(1 << 31), 1 << 31, (num_masks, num_words)).to(torch.int32)
    mask_rows = torch.randint(-1, num_masks, (num_rows,), dtype=torch.int32) if named else None
    logits = torch.randn(num_rows, vocab_size + 9).to(dtype)[:, :vocab_size]
    expected = logits.clone()
    reference.apply_token_bitmask(expected, bitmask, mask_rows)
    on_device = logits.to(device)
    form(on_device, bitmask.to(device), None if mask_rows is None else mask_rows.to(device))
    assert torch.equal(on_device.cpu(), expected)


@pytest.mark.parametrize(
    ("logits", "bitmask", "rows"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int32), None),
        (torch.zeros(8, 2).T, torch.zeros(2, 1, dtype=torch.int32), None),
        (torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int64), None),
        (torch.zeros(2, 8), torch.zeros(3, 1, dtype=torch.int32), None),
        (torch.zeros(2, 8), torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)),
    ],
)
def test_bad_input_is_refused(logits, bitmask, rows):
    with pytest.raises(ValueError, match=r"must|masks"):
        token_bitmask.apply_token_bitmask(logits, bitmask, rows)
