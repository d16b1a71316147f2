"""Pages to store into, twice: for the oracle and for the form under test."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
NUM_PAGES = 23

Pages = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""k_pages, v_pages, k_scales, v_scales."""


def make_pages(
    num_heads: int,
    dim: int,
    v_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_pages: int = NUM_PAGES,
) -> tuple[Pages, Pages]:
    """The same pages on the CPU and on `device`; scales where `dtype` is fp8."""
    shape = (num_pages, num_heads, page_size)
    k_pages, v_pages = torch.full((*shape, dim), 9.0).to(dtype), torch.full((*shape, v_dim), 9.0).to(dtype)
    scales = [torch.full(shape, 9.0) if dtype == FP8 else None for _ in range(2)]
    pages = (k_pages, v_pages, *scales)
    return pages, tuple(None if t is None else t.clone().to(device) for t in pages)


def make_slots(num_tokens: int, page_size: int) -> torch.Tensor:
    """Distinct slots, two of them negative."""
    slots = torch.randperm(NUM_PAGES * page_size)[:num_tokens]
    slots[torch.randperm(num_tokens)[:2]] = -1
    return slots


def assert_same_pages(got: Pages, expected: Pages) -> None:
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a.cpu().float(), b.float(), atol=0, rtol=0, equal_nan=True)
