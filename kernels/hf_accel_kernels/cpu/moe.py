"""ctypes call of the CPU experts op (`moe.h`).

Owns the argument struct: one per Python thread, reused. Knows nothing about when the op is to be used; `moe.py` above
decides and validates.
"""

from __future__ import annotations

import ctypes
import threading

import torch

from . import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}  # HfaMoeActivation
_ERRORS = {1: "an expert id is negative", 2: "out of memory", 3: "this build has no float16"}


class MoeArgs(ctypes.Structure):
    """`HfaMoeArgs`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "activation", "round_weighted", "num_threads")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "top_k", "num_experts", "hidden_size")),
        ("intermediate_size", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("expert_ids", ctypes.c_void_p),
        ("expert_weights", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    )


class _ThreadArgs(threading.local):
    def __init__(self) -> None:
        self.args = MoeArgs()
        self.ref = ctypes.byref(self.args)


_own = _ThreadArgs()


class CpuMoe:
    """The op of one loaded library.

    Raises:
        RuntimeError: the library could not be built or loaded; the message says why.
    """

    def __init__(self) -> None:
        lib, reason = library.load()
        if lib is None:
            raise RuntimeError(reason)
        self._experts = lib.hfa_moe_experts
        self._experts.argtypes, self._experts.restype = (ctypes.c_void_p,), ctypes.c_int32
        lib.hfa_moe_tile_tokens.argtypes, lib.hfa_moe_tile_tokens.restype = (), ctypes.c_int32
        self.tile_tokens: int = lib.hfa_moe_tile_tokens()
        """Tokens of one expert from which bfloat16 goes through matrix tiles; 0: never here."""

    def experts(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        activation: str,
        round_weighted: bool,
        out: torch.Tensor,
    ) -> None:
        """`moe.moe_experts` into `out`; ids, gate_up and down contiguous, expert_weights float32 and contiguous.

        Raises:
            ValueError: a negative expert id.
            MemoryError: no room for the intermediate activations.
        """
        args = _own.args
        args.dtype = DTYPES[hidden.dtype]
        args.activation = ACTIVATIONS[activation]
        args.round_weighted = round_weighted
        args.num_threads = torch.get_num_threads()
        args.num_tokens, args.top_k = expert_ids.shape
        args.num_experts, args.hidden_size, args.intermediate_size = down.shape
        args.hidden, args.hidden_stride = hidden.data_ptr(), hidden.stride(0)
        args.expert_ids = expert_ids.data_ptr()
        args.expert_weights = expert_weights.data_ptr()
        args.gate_up, args.down = gate_up.data_ptr(), down.data_ptr()
        args.out, args.out_stride = out.data_ptr(), out.stride(0)
        code = self._experts(_own.ref)
        if code == 2:
            raise MemoryError(_ERRORS[code])
        if code:
            raise ValueError(_ERRORS[code])
