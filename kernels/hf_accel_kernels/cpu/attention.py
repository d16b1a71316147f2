"""ctypes calls of the CPU attention ops (`paged_attention.h`), with little Python on the way.

Owns the argument structs: one of each per Python thread, reused, so that callers in several threads never share one.
Knows nothing about when the ops are to be used; `ops.py` decides and validates.
"""

from __future__ import annotations

import ctypes
import threading

import torch

from . import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class AttentionArgs(ctypes.Structure):
    """`HfaAttentionArgs`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "num_seqs", "num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("v_head_dim", "page_size", "num_threads", "sliding_window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("q_token_stride", ctypes.c_int64),
        ("q_head_stride", ctypes.c_int64),
        ("k_pages", ctypes.c_void_p),
        ("v_pages", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("page_table_stride", ctypes.c_int64),
        ("seq_lens", ctypes.c_void_p),
        ("query_start_loc", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_token_stride", ctypes.c_int64),
        ("out_head_stride", ctypes.c_int64),
    )


class StoreKvArgs(ctypes.Structure):
    """`HfaStoreKvArgs`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "num_tokens", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("v_head_dim", "page_size", "num_threads")),
        ("k", ctypes.c_void_p),
        ("k_token_stride", ctypes.c_int64),
        ("k_head_stride", ctypes.c_int64),
        ("v", ctypes.c_void_p),
        ("v_token_stride", ctypes.c_int64),
        ("v_head_stride", ctypes.c_int64),
        ("k_pages", ctypes.c_void_p),
        ("v_pages", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
    )


class _ThreadArgs(threading.local):
    def __init__(self) -> None:
        self.attention = AttentionArgs()
        self.attention_ref = ctypes.byref(self.attention)
        self.store = StoreKvArgs()
        self.store_ref = ctypes.byref(self.store)


_args = _ThreadArgs()


class CpuAttention:
    """The ops of one loaded library.

    Raises:
        RuntimeError: the library could not be built or loaded, or lacks the ops; the message says why.
    """

    def __init__(self) -> None:
        lib, reason = library.load()
        if lib is None:
            raise RuntimeError(reason)
        try:
            self._attention = lib.hfa_paged_attention
            self._store = lib.hfa_store_kv
            self._tiles = lib.hfa_attention_tiles
        except AttributeError as error:
            raise RuntimeError(f"the CPU library has no attention ops: {error}") from None
        self._attention.argtypes = self._store.argtypes = (ctypes.c_void_p,)
        self._tiles.argtypes = (ctypes.c_int,)
        self._attention.restype = self._store.restype = self._tiles.restype = ctypes.c_int

    def use_tiles(self, wanted: bool) -> bool:
        """Whether bf16 prefill may use the tile unit (AMX), for the whole process: it may at first. Returns whether it will."""
        return bool(self._tiles(wanted))

    def paged_attention(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        sliding_window: int,
        softcap: float,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """`ops.paged_attention` into `out`; arguments as validated there, sinks float32 and contiguous."""
        args = _args.attention
        args.dtype = DTYPES[q.dtype]
        args.num_seqs = seq_lens.shape[0]
        args.num_heads = q.shape[1]
        _, args.num_kv_heads, args.page_size, args.head_dim = k_pages.shape
        args.v_head_dim = v_pages.shape[3]
        args.num_threads = torch.get_num_threads()
        args.sliding_window = sliding_window
        args.scale = scale
        args.softcap = softcap
        args.sinks = sinks.data_ptr() if sinks is not None else None
        args.q = q.data_ptr()
        args.q_token_stride, args.q_head_stride, _ = q.stride()
        args.k_pages = k_pages.data_ptr()
        args.v_pages = v_pages.data_ptr()
        args.page_table = page_table.data_ptr()
        args.page_table_stride = page_table.stride(0)
        args.seq_lens = seq_lens.data_ptr()
        args.query_start_loc = query_start_loc.data_ptr()
        args.out = out.data_ptr()
        args.out_token_stride, args.out_head_stride, _ = out.stride()
        code = self._attention(_args.attention_ref)
        assert code == 0, code

    def store_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """`ops.store_kv`; arguments as validated there."""
        args = _args.store
        args.dtype = DTYPES[k.dtype]
        args.num_tokens = k.shape[0]
        _, args.num_kv_heads, args.page_size, args.head_dim = k_pages.shape
        args.v_head_dim = v_pages.shape[3]
        args.num_threads = torch.get_num_threads()
        args.k = k.data_ptr()
        args.k_token_stride, args.k_head_stride, _ = k.stride()
        args.v = v.data_ptr()
        args.v_token_stride, args.v_head_stride, _ = v.stride()
        args.k_pages = k_pages.data_ptr()
        args.v_pages = v_pages.data_ptr()
        args.slot_mapping = slot_mapping.data_ptr()
        code = self._store(_args.store_ref)
        assert code == 0, code
