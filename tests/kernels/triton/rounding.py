"""How alike two results are that round at the same places, but sum in another order before."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {
    torch.float32: 2.0**-20,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}  # relative: sums; then one unit at most
MOST_CHANGED = 0.01  # share of elements on whose rounding the order may decide


def assert_rounded_alike(got: torch.Tensor, expected: torch.Tensor) -> None:
    """In half precision, at most a few elements differ, each by one unit in the last place before a product with a weight."""
    got = got.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got.float(), expected.float(), rtol=1.01 * STEPS[got.dtype], atol=1e-30)
    if got.dtype != torch.float32:
        changed = int((got != expected).sum())
        assert changed <= max(1, MOST_CHANGED * got.numel()), f"{changed} of {got.numel()} elements differ"
