"""The latent cache's bytes (DeepSeek's multi-head latent attention): one tensor of pages for each layer.

Owns the memory, as `pool.MHAPool` does for keys and values, and the dtype it is kept in. A token's row is its latent
(`kv_lora_rank` values) followed by the rotated key that all heads share (`qk_rope_head_dim`). With fp8 storage each row
has two scales beside it, one for either part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_accel.kv_cache.pool import HUGE_PAGE, ask_for_huge_pages, independent_batches

FP8 = torch.float8_e4m3fn
NUM_SCALES = 2  # of a token in fp8 storage: the latent's and the rotary key's


@dataclass(frozen=True)
class LatentShape:
    """What one MLA layer keeps for a token: `rank` values of latent and `rope_dim` of rotated key, for all heads."""

    rank: int
    rope_dim: int

    @property
    def width(self) -> int:
        """Values of a token."""
        return self.rank + self.rope_dim

    # As transformers' own cache has it: the latent stands where one head's key would, the rotated key where its value would.
    num_kv_heads = 1

    @property
    def head_dim(self) -> int:
        return self.rank

    @property
    def v_head_dim(self) -> int:
        return self.rope_dim


class MLAPool:
    """Paged latents of every layer, pages numbered alike in all layers.

    `pages[layer]` is [num_pages, page_size, rank + rope_dim]; `scales[layer]` is None, or with fp8 storage
    [num_pages, page_size, 2] float32.

    Args:
        layers: the layers' shapes, in the model's order.
        num_pages: pages in the pool; page ids are 0..num_pages-1.
        page_size: tokens in a page.
        dtype: the model's, or torch.float8_e4m3fn for fp8 storage.
        device: where they are.
    """

    def __init__(
        self,
        layers: Sequence[LatentShape],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if num_pages <= 0 or page_size <= 0:
            raise ValueError(f"num_pages ({num_pages}) and page_size ({page_size}) must be positive")
        self.layers = tuple(layers)
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.pages: list[torch.Tensor] = []
        self.scales: list[torch.Tensor | None] = []
        self.restore()

    @staticmethod
    def bytes_per_token_for(layers: Sequence[LatentShape], dtype: torch.dtype) -> int:
        """Bytes of one token over all layers."""
        scales = 4 * NUM_SCALES if dtype == FP8 else 0
        return sum(layer.width * dtype.itemsize + scales for layer in layers)

    @staticmethod
    def bytes_per_page_for(layers: Sequence[LatentShape], page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers, to size a pool before it is made."""
        return MLAPool.bytes_per_token_for(layers, dtype) * page_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return self.bytes_per_token_for(self.layers, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes held now: 0 while released."""
        return sum(t.nbytes for t in (*self.pages, *self.scales) if t is not None)

    @property
    def is_released(self) -> bool:
        return not self.pages and bool(self.layers)

    def copy_pages(self, page_copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination) in every layer, as if one after the other."""
        for batch in independent_batches(page_copies):
            sources, destinations = torch.tensor(batch, device=self.device).unbind(1)  # [num_copies] each
            for tensor in (*self.pages, *self.scales):
                if tensor is None:
                    continue
                values = tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor  # fp8 has no index ops
                values.index_copy_(0, destinations, values.index_select(0, sources))

    def release(self) -> None:
        """Give the memory back; the contents are lost. The caller must hold no tensor of the pool, and no page."""
        self.pages.clear()
        self.scales.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Take the memory again, with undefined contents; does nothing when it is held."""
        if self.pages:
            return
        for layer in self.layers:
            pages = torch.empty(self.num_pages, self.page_size, layer.width, dtype=self.dtype, device=self.device)
            if self.device.type == "cpu" and pages.nbytes >= HUGE_PAGE:
                ask_for_huge_pages(pages)
            self.pages.append(pages)
            scales = None
            if self.dtype == FP8:
                scales = torch.empty(self.num_pages, self.page_size, NUM_SCALES, device=self.device)
            self.scales.append(scales)
