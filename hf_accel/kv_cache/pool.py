"""The KV cache's bytes: one tensor of key pages and one of value pages for each layer.

Owns the memory, copying pages, and giving it back and taking it again. Knows nothing about who holds which page (the allocator does)
and never reads it. Slots are not zeroed: a backend reads only slots below a sequence's length, which were written.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
HUGE_PAGE = 2 << 20  # bytes; also the tensor size from which huge pages are asked for


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps for a token: num_kv_heads keys of head_dim, and values of v_head_dim."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int


class PagePool(ABC):
    """What every pool of pages does with its tensors, whose first axis is the page.

    Args:
        layers: the layers' shapes, in the model's order.
        num_pages: pages in the pool; page ids are 0..num_pages-1.
        page_size: tokens in a page.
        dtype: of what is stored.
        device: where it is.
        num_reserved: pages behind those, ids from `num_pages` on, which no request ever gets: padding writes there.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_reserved: int = 0,
    ) -> None:
        if num_pages <= 0 or page_size <= 0:
            raise ValueError(f"num_pages ({num_pages}) and page_size ({page_size}) must be positive")
        self.layers = tuple(layers)
        self.num_pages = num_pages
        self.num_reserved = num_reserved
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self._tensors: list[torch.Tensor] = []
        self.restore()

    @staticmethod
    @abstractmethod
    def bytes_per_token_for(layers: Sequence[Any], dtype: torch.dtype) -> int:
        """Bytes of one token over all layers, to size a pool before it is made."""

    @abstractmethod
    def _take(self) -> None:
        """Make the tensors of all layers with `_allocate`."""

    @abstractmethod
    def _drop(self) -> None:
        """Let go of them."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return self.bytes_per_token_for(self.layers, self.dtype)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return self.bytes_per_token * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes held now, those of reserved pages among them: 0 while released."""
        return sum(t.nbytes for t in self._tensors)

    def addresses(self) -> list[int]:
        """Where the tensors are now."""
        return [t.data_ptr() for t in self._tensors]

    @property
    def is_released(self) -> bool:
        return not self._tensors and bool(self.layers)

    def copy_pages(self, page_copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination) in every layer, as if one after the other."""
        for batch in _independent_batches(page_copies):
            pairs = torch.tensor(batch)
            if self.device.type == "cuda":
                pairs = pairs.pin_memory()  # the host does not wait
            sources, destinations = pairs.to(self.device, non_blocking=True).unbind(1)  # [num_copies] each
            for tensor in self._tensors:
                values = tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor  # fp8 has no index ops
                values.index_copy_(0, destinations, values.index_select(0, sources))

    def release(self) -> None:
        """Give the memory back; the contents are lost. The caller must hold no tensor of the pool, and no page."""
        self._tensors.clear()
        self._drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Take the memory again, with undefined contents; does nothing when it is held."""
        if self._tensors:
            return
        try:
            self._take()
        except BaseException:  # out of memory, half way
            self.release()
            raise

    def _allocate(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[num_pages + num_reserved, *shape] of the pool's dtype or another."""
        tensor = torch.empty(
            (self.num_pages + self.num_reserved, *shape), dtype=dtype or self.dtype, device=self.device
        )
        if self.device.type == "cpu" and tensor.nbytes >= HUGE_PAGE:
            _ask_for_huge_pages(tensor)
        self._tensors.append(tensor)
        return tensor


class MHAPool(PagePool):
    """Paged keys and values of every layer, pages numbered alike in all layers; arguments as `PagePool`'s.

    `k_pages[layer]` is [num_pages + num_reserved, num_kv_heads, page_size, head_dim] and `v_pages[layer]` the same with v_head_dim: a
    page's head is contiguous, which CPU attention reads up to 38% faster than token-major pages.
    """

    k_pages: list[torch.Tensor]
    v_pages: list[torch.Tensor]

    @staticmethod
    def bytes_per_token_for(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        """See `PagePool`."""
        return sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in layers) * dtype.itemsize

    def _take(self) -> None:
        size = self.page_size
        self.k_pages = [self._allocate(layer.num_kv_heads, size, layer.head_dim) for layer in self.layers]
        self.v_pages = [self._allocate(layer.num_kv_heads, size, layer.v_head_dim) for layer in self.layers]

    def _drop(self) -> None:
        self.k_pages, self.v_pages = [], []


def _independent_batches(page_copies: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut a sequence of copies into batches that read all sources before they write, to the same effect."""
    batch: list[tuple[int, int]] = []
    written: set[int] = set()
    for source, destination in page_copies:
        if source in written or destination in written:
            yield batch
            batch, written = [], set()
        batch.append((source, destination))
        written.add(destination)
    if batch:
        yield batch


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _ask_for_huge_pages(pages: torch.Tensor) -> None:
    """Advise 2 MB pages for memory not touched yet: scattered page reads then miss the TLB far less. Only a hint."""
    madvise = _madvise()
    if madvise is None:
        return
    begin = -(-pages.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (pages.data_ptr() + pages.nbytes) // HUGE_PAGE * HUGE_PAGE
    if begin < end:
        madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
