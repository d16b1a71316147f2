"""kv_b_proj's weight for absorbed latent attention: which rows of it are which head's Wuk and Wuv.

Owns a copy in large memory pages where that is asked for; else the weight is read in place. Knows tensors only, not when
weights change (call `update`).
"""

from __future__ import annotations

import torch

from .huge_pages import empty_in_huge_pages


class AbsorbedWeights:
    """Wuk [num_heads, nope, rank] takes queries into latent space, Wuv [num_heads, v, rank] takes latents out of it.

    Attributes:
        weight: [num_heads * (nope + v), rank], what is read; a copy's address outlives `update`.
    """

    def __init__(self, weight: torch.Tensor, num_heads: int, nope: int, packed: bool = False) -> None:
        """Take the weight apart.

        Args:
            weight: [num_heads * (nope + v), rank], kv_b_proj's.
            num_heads: attention heads.
            nope: values of a query head without a position.
            packed: on CPU, keep a copy in huge pages: a decode step's products are 2 to 5 % faster for twice the memory.
                False reads the weight in place, and keeps it alive.

        Raises:
            ValueError: the sizes do not fit.
        """
        if weight.ndim != 2 or num_heads <= 0 or nope <= 0 or weight.shape[0] % num_heads:
            raise ValueError(
                f"weight must be [num_heads * (nope + v), rank] for {num_heads} heads and nope {nope}, got "
                f"{tuple(weight.shape)}"
            )
        self.num_heads, self.nope, self.rank = num_heads, nope, weight.shape[1]
        self.v = weight.shape[0] // num_heads - nope
        if self.v <= 0:
            raise ValueError(f"{weight.shape[0] // num_heads} rows a head leave no values beside nope {nope}")
        self.packed = packed and weight.device.type == "cpu"
        self.weight = empty_in_huge_pages(weight.shape, weight.dtype) if self.packed else weight.detach()
        self.update(weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def num_bytes(self) -> int:
        """Bytes held beside the weight itself."""
        return self.weight.nbytes if self.packed else 0

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Wuk, Wuv) as views of what is read."""
        per_head = self.weight.unflatten(0, (self.num_heads, -1))
        return per_head[:, : self.nope], per_head[:, self.nope :]

    def update(self, weight: torch.Tensor) -> None:
        """Take another weight of the same shape, dtype and device; a copy is written again in place.

        Raises:
            ValueError: it differs in one of these.
        """
        expected = (self.num_heads * (self.nope + self.v), self.rank)
        if weight.shape != expected or weight.dtype != self.dtype or weight.device != self.device:
            raise ValueError(
                f"expected a weight of shape {expected}, {self.dtype} on {self.device}, got {tuple(weight.shape)}, "
                f"{weight.dtype} on {weight.device}"
            )
        weight = weight.detach()
        if self.packed:
            self.weight.copy_(weight)
        else:
            self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
