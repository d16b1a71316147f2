"""ctypes calls of the CPU latent attention ops (`mla_attention.h`), with little Python on the way.

Owns the argument structs, one of each per Python thread. Knows nothing about when the ops are to be used; `mla.py` decides
and validates.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

import torch

from . import library
from .attention import DTYPES

if TYPE_CHECKING:
    from hf_accel_kernels.mla_weights import AbsorbedWeights


class MlaArgs(ctypes.Structure):
    """`HfaMlaArgs`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "num_seqs", "num_heads", "rank", "rope", "page_size")),
        ("num_threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("q", ctypes.c_void_p),
        ("q_token_stride", ctypes.c_int64),
        ("q_head_stride", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("page_table_stride", ctypes.c_int64),
        ("seq_lens", ctypes.c_void_p),
        ("query_start_loc", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_token_stride", ctypes.c_int64),
        ("out_head_stride", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("nope", ctypes.c_int32),
        ("v", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
    )


class MlaStoreArgs(ctypes.Structure):
    """`HfaMlaStoreArgs`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "num_tokens", "rank", "rope", "page_size", "num_threads")),
        ("latent", ctypes.c_void_p),
        ("latent_stride", ctypes.c_int64),
        ("rope_key", ctypes.c_void_p),
        ("rope_key_stride", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
    )


class _ThreadArgs(threading.local):
    def __init__(self) -> None:
        self.attention = MlaArgs()
        self.attention_ref = ctypes.byref(self.attention)
        self.store = MlaStoreArgs()
        self.store_ref = ctypes.byref(self.store)


_args = _ThreadArgs()


class CpuMla:
    """The ops of one loaded library.

    Raises:
        RuntimeError: the library could not be built or loaded; the message says why.
    """

    def __init__(self) -> None:
        lib, reason = library.load()
        if lib is None:
            raise RuntimeError(reason)
        self._attention, self._absorbed, self._store = (
            lib.hfa_mla_attention,
            lib.hfa_mla_absorbed_attention,
            lib.hfa_mla_store,
        )
        for function in (self._attention, self._absorbed, self._store):
            function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int

    def attention(
        self,
        q: torch.Tensor,
        pages: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        rank: int,
        scales: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """`mla.mla_attention` into `out`; arguments as validated there."""
        _fill(q, pages, page_table, seq_lens, query_start_loc, scale, rank, scales, out)
        _check(self._attention(_args.attention_ref))

    def absorbed(
        self,
        q: torch.Tensor,
        weights: AbsorbedWeights,
        pages: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        scales: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """`mla.mla_absorbed_attention` into `out`; arguments as validated there."""
        _fill(q, pages, page_table, seq_lens, query_start_loc, scale, weights.rank, scales, out)
        args = _args.attention
        args.num_tokens, args.nope, args.v = q.shape[0], weights.nope, weights.v
        args.weight, args.weight_stride = weights.weight.data_ptr(), weights.weight.stride(0)
        _check(self._absorbed(_args.attention_ref))

    def store(
        self,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        pages: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:
        """`mla.mla_store`; arguments as validated there."""
        args = _args.store
        args.dtype = DTYPES[latent.dtype]
        args.num_tokens, args.rank = latent.shape
        args.rope, args.page_size = rope_key.shape[1], pages.shape[1]
        args.num_threads = torch.get_num_threads()
        args.latent, args.latent_stride = latent.data_ptr(), latent.stride(0)
        args.rope_key, args.rope_key_stride = rope_key.data_ptr(), rope_key.stride(0)
        args.pages = pages.data_ptr()
        args.scales = None if scales is None else scales.data_ptr()
        args.slot_mapping = slot_mapping.data_ptr()
        _check(self._store(_args.store_ref))


def _fill(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    rank: int,
    scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    args = _args.attention
    args.dtype = DTYPES[q.dtype]
    args.num_seqs, args.num_heads = seq_lens.shape[0], q.shape[1]
    args.rank, args.rope, args.page_size = rank, pages.shape[2] - rank, pages.shape[1]
    args.num_threads, args.scale = torch.get_num_threads(), scale
    args.q = q.data_ptr()
    args.q_token_stride, args.q_head_stride, _ = q.stride()
    args.pages = pages.data_ptr()
    args.scales = None if scales is None else scales.data_ptr()
    args.page_table, args.page_table_stride = page_table.data_ptr(), page_table.stride(0)
    args.seq_lens, args.query_start_loc = seq_lens.data_ptr(), query_start_loc.data_ptr()
    args.out = out.data_ptr()
    args.out_token_stride, args.out_head_stride, _ = out.stride()


def _check(code: int) -> None:
    if code == 2:
        raise MemoryError("no memory for latent attention")
    assert code == 0, code
