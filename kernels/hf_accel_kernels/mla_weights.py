"""kv_b_proj's weight taken apart for absorbed latent attention.

Owns packed copies, one of Wuk^T and one of Wuv for each head, where the C++ library can use them; else views of the
weight. Knows tensors only, not when weights change (call `update`).
"""

from __future__ import annotations

import ctypes

import torch

from .cpu.abi import DTYPES, fused_library
from .packed import PackedLinear


class AbsorbedWeights:
    """Wuk [num_heads, nope, rank] takes queries into latent space, Wuv [num_heads, v, rank] takes latents out of it.

    Packed copies keep their addresses over `update`. Without them (`packed=False`, another device, float16, no C++
    library) the weight is only viewed, and kept alive.
    """

    def __init__(self, weight: torch.Tensor, num_heads: int, nope: int, packed: bool = True) -> None:
        """Take the weight apart.

        Args:
            weight: [num_heads * (nope + v), rank], kv_b_proj's.
            num_heads: attention heads.
            nope: values of a query head without a position.
            packed: False to hold no copy: less memory, slower on CPU.

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
        self.dtype, self.device = weight.dtype, weight.device
        self.packed: list[PackedLinear] | None = None  # Wuk^T of every head, then Wuv of every head
        self._handles: ctypes.Array[ctypes.c_void_p] | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None
        if packed and weight.device.type == "cpu" and weight.dtype in DTYPES and fused_library() is not None:
            self.packed = [PackedLinear([part]) for part in self._parts(weight)]
            self._handles = (ctypes.c_void_p * len(self.packed))(*(linear.handle for linear in self.packed))
        else:
            self._views = self._split(weight)

    @property
    def num_bytes(self) -> int:
        """Bytes held beside the weight itself."""
        return sum(linear.num_bytes for linear in self.packed or ())

    @property
    def handles(self) -> int:
        """Address of the packed weights' handles, [2 * num_heads]."""
        assert self._handles is not None
        return ctypes.addressof(self._handles)

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Wuk, Wuv) as views of the weight; only where nothing is packed."""
        assert self._views is not None
        return self._views

    def update(self, weight: torch.Tensor) -> None:
        """Take another weight of the same shape, dtype and device; packed copies are written again in place.

        Raises:
            ValueError: it differs in one of these.
        """
        expected = (self.num_heads * (self.nope + self.v), self.rank)
        if weight.shape != expected or weight.dtype != self.dtype or weight.device != self.device:
            raise ValueError(
                f"expected a weight of shape {expected}, {self.dtype} on {self.device}, got {tuple(weight.shape)}, "
                f"{weight.dtype} on {weight.device}"
            )
        if self.packed is None:
            self._views = self._split(weight)
            return
        for linear, part in zip(self.packed, self._parts(weight), strict=True):
            linear.repack(0, part)

    def _split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        per_head = weight.detach().unflatten(0, (self.num_heads, -1))
        return per_head[:, : self.nope], per_head[:, self.nope :]

    def _parts(self, weight: torch.Tensor) -> list[torch.Tensor]:
        w_uk, w_uv = self._split(weight)
        return [*w_uk.transpose(1, 2).contiguous(), *w_uv]
