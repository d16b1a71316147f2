"""The latent cache's bytes (DeepSeek's multi-head latent attention): one tensor of pages for each layer.

Owns the memory, as `pool.MHAPool` does for keys and values, and the dtype it is kept in. A token's row is its latent
(`kv_lora_rank` values) followed by the rotated key that all heads share (`qk_rope_head_dim`). With fp8 storage each row
has two scales beside it, one for either part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_accel.kv_cache.pool import FP8, PagePool

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


class MLAPool(PagePool):
    """Paged latents of every layer, pages numbered alike in all layers; arguments as `PagePool`'s, `dtype` also `FP8`.

    `pages[layer]` is [num_pages + num_reserved, page_size, rank + rope_dim]; `scales[layer]` is None, or with fp8 storage
    [num_pages + num_reserved, page_size, 2] float32.
    """

    pages: list[torch.Tensor]
    scales: list[torch.Tensor | None]

    @staticmethod
    def bytes_per_token_for(layers: Sequence[LatentShape], dtype: torch.dtype) -> int:
        """See `PagePool`."""
        scales = 4 * NUM_SCALES if dtype == FP8 else 0
        return sum(layer.width * dtype.itemsize + scales for layer in layers)

    def _take(self) -> None:
        size, has_scales = self.page_size, self.dtype == FP8
        self.pages = [self._allocate(size, layer.width) for layer in self.layers]
        self.scales = [
            self._allocate(size, NUM_SCALES, dtype=torch.float32) if has_scales else None for _ in self.layers
        ]

    def _drop(self) -> None:
        self.pages, self.scales = [], []
