"""The ctypes side of gemm.h and decoder.h: structures field by field, and the signatures.

Owns the mirror of the C declarations, nothing else. A field added there is added here, in the same place.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from hf_accel_kernels.cpu import library

_POINTER, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # HfaDtype
EPILOGUES = {"plain": 0, "silu_mul": 1}  # HfaEpilogue


class LinearArgs(ctypes.Structure):
    """HfaLinearArgs of gemm.h."""

    _fields_ = [
        ("x", _POINTER),
        ("x_stride", _I64),
        ("num_rows", _I64),
        ("out", _POINTER),
        ("out_stride", _I64),
        ("residual", _POINTER),
        ("residual_stride", _I64),
        ("scale", _F32),
        ("epilogue", _I32),
        ("out_float32", _I32),
        ("keep_float32", _I32),
        ("num_threads", _I32),
    ]


class DecoderLayer(ctypes.Structure):
    """HfaDecoderLayer of decoder.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("qkv", "o_proj", "gate_up", "down")),
        *((name, _POINTER) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        ("scale", _F32),
        ("sliding_window", _I32),
        ("use_rope", _I32),
    ]


class Decoder(ctypes.Structure):
    """HfaDecoder of decoder.h."""

    _fields_ = [
        *((name, _I32) for name in ("dtype", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        ("page_size", _I32),
        *(
            (name, _I64)
            for name in ("hidden_size", "intermediate_size", "vocab_size", "embedding_rows", "max_positions")
        ),
        *((name, _F32) for name in ("norm_eps", "embedding_multiplier", "residual_multiplier", "logits_divisor")),
        *((name, _POINTER) for name in ("embedding", "final_norm", "lm_head", "cos", "sin")),
        ("layers", ctypes.POINTER(DecoderLayer)),
        ("workspace", _POINTER),
    ]


class Batch(ctypes.Structure):
    """HfaBatch of decoder.h."""

    _fields_ = [
        *((name, _I64) for name in ("num_tokens", "num_seqs", "num_logits", "num_pages", "page_table_stride")),
        *((name, _POINTER) for name in ("input_ids", "hidden", "positions", "slot_mapping", "page_table", "seq_lens")),
        *((name, _POINTER) for name in ("query_start_loc", "logits_indices", "k_pages", "v_pages", "logits")),
        ("num_threads", _I32),
    ]


@functools.cache
def fused_library() -> ctypes.CDLL | None:
    """The shared library with the signatures of gemm.h and decoder.h declared, or None where it could not be built."""
    lib, _ = library.load()
    if lib is None:
        return None
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.hfa_panel_columns.restype = i32
    lib.hfa_amx.argtypes, lib.hfa_amx.restype = [i32], i32
    lib.hfa_packed_create.argtypes, lib.hfa_packed_create.restype = [i64, i64, i32, i32], pointer
    lib.hfa_packed_destroy.argtypes, lib.hfa_packed_destroy.restype = [pointer], None
    lib.hfa_packed_bytes.argtypes, lib.hfa_packed_bytes.restype = [pointer], i64
    lib.hfa_pack_weight.argtypes = [pointer, pointer, i64, i64, i64, i64, i64, pointer, i32]
    lib.hfa_pack_weight.restype = None
    lib.hfa_packed_linear.argtypes, lib.hfa_packed_linear.restype = [pointer, ctypes.POINTER(LinearArgs)], None
    lib.hfa_workspace_create.argtypes, lib.hfa_workspace_create.restype = [], pointer
    lib.hfa_workspace_destroy.argtypes, lib.hfa_workspace_destroy.restype = [pointer], None
    lib.hfa_decoder_forward.argtypes = [ctypes.POINTER(Decoder), ctypes.POINTER(Batch)]
    lib.hfa_decoder_forward.restype = i32
    return lib
