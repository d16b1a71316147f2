"""The pool's shapes, sizes, and giving memory back and taking it again."""

from __future__ import annotations

import random

import pytest
import torch

from hf_accel.kv_cache.mla_pool import FP8, LatentShape, MLAPool
from hf_accel.kv_cache.pool import LayerShape, MHAPool

LAYERS = [LayerShape(2, 16, 16), LayerShape(1, 24, 8)]


def test_shapes_and_sizes() -> None:
    pool = MHAPool(LAYERS, num_pages=5, page_size=4, dtype=torch.bfloat16, device="cpu")
    assert [tuple(t.shape) for t in pool.k_pages] == [(5, 2, 4, 16), (5, 1, 4, 24)]
    assert [tuple(t.shape) for t in pool.v_pages] == [(5, 2, 4, 16), (5, 1, 4, 8)]
    assert all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (*pool.k_pages, *pool.v_pages))
    assert pool.bytes_per_page == (2 * 32 + 32) * 4 * 2
    assert pool.bytes_per_page == 4 * MHAPool.bytes_per_token_for(LAYERS, torch.bfloat16)
    assert pool.num_bytes == 5 * pool.bytes_per_page


def test_release_and_restore() -> None:
    pool = MHAPool(LAYERS, num_pages=5, page_size=4, dtype=torch.float32, device="cpu")
    shapes = [t.shape for t in (*pool.k_pages, *pool.v_pages)]
    assert not pool.is_released
    pool.release()
    assert pool.is_released and pool.num_bytes == 0
    pool.release()
    pool.restore()
    kept = pool.k_pages[0]
    pool.restore()
    assert pool.k_pages[0] is kept
    assert [t.shape for t in (*pool.k_pages, *pool.v_pages)] == shapes
    assert pool.num_bytes == 5 * pool.bytes_per_page


def test_large_pool_is_writable_from_end_to_end() -> None:
    """Large tensors take the huge-page advice, which must not change what they hold."""
    pool = MHAPool([LayerShape(4, 64, 64)], num_pages=300, page_size=16, dtype=torch.float32, device="cpu")
    pages = pool.k_pages[0]
    assert pages.nbytes > 4 << 20
    pages.copy_(torch.arange(pages.numel(), dtype=torch.float32).view_as(pages))
    assert pages.view(-1)[-1] == pages.numel() - 1 and pages.view(-1)[0] == 0


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (4, 0), (-1, 16)])
def test_sizes_must_be_positive(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        MHAPool(LAYERS, num_pages=num_pages, page_size=page_size, dtype=torch.float32, device="cpu")


def filled_pool(num_pages: int) -> MHAPool:
    pool = MHAPool(LAYERS, num_pages, page_size=4, dtype=torch.float32, device="cpu")
    for pages in (*pool.k_pages, *pool.v_pages):
        pages.normal_()
    return pool


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_as_if_made_one_by_one(seed: int) -> None:
    draw = random.Random(seed)
    pool = filled_pool(7)
    copies = []
    while len(copies) < draw.randrange(12):
        source, destination = draw.sample(range(7), 2)
        copies.append((source, destination))
    expected = [pages.clone() for pages in (*pool.k_pages, *pool.v_pages)]
    for pages in expected:
        for source, destination in copies:
            pages[destination] = pages[source].clone()
    pool.copy_pages(copies)
    for pages, wanted in zip((*pool.k_pages, *pool.v_pages), expected, strict=True):
        assert torch.equal(pages, wanted)


def test_copies_in_inference_mode_leave_the_pool_usable() -> None:
    pool = filled_pool(3)
    with torch.inference_mode():
        pool.copy_pages([(0, 1), (1, 2)])
    pool.copy_pages([(2, 0)])
    assert torch.equal(pool.k_pages[0][2], pool.k_pages[0][0]) and not pool.k_pages[0].is_inference()


def test_a_pool_that_memory_has_no_room_for_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = MHAPool(LAYERS, 5, 4, torch.float32, "cpu")
    pool.release()
    room = [2]
    allocate = torch.empty

    def scarce(*args: object, **kwargs: object) -> torch.Tensor:
        room[0] -= 1
        if room[0] < 0:
            raise RuntimeError("out of memory")
        return allocate(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.restore()
    assert pool.is_released and pool.num_bytes == 0
    room[0] = 100
    pool.restore()
    assert not pool.is_released and pool.num_bytes == 5 * pool.bytes_per_page


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_latent_pages_are_copied_with_their_scales(dtype: torch.dtype) -> None:
    pool = MLAPool([LatentShape(8, 4), LatentShape(6, 2)], 4, 3, dtype, "cpu")
    tensors = [t for t in (*pool.pages, *pool.scales) if t is not None]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    before = [t.float().clone() for t in tensors]
    pool.copy_pages([(0, 2), (2, 1)])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.float(), old[[0, 0, 0, 3]])
    assert pool.num_bytes == 4 * pool.bytes_per_page == 4 * 3 * pool.bytes_per_token
