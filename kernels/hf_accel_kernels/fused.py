"""A whole forward step of a dense Llama-like decoder on CPU as one C call (`cpu/decoder.cpp`), over paged KV.

Owns packed copies of the linears and norms and the step's workspace; borrows the embedding table and the pages. Knows
tensors only: not transformers, not the scheduler, not when weights change (call `update`).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from hf_accel_kernels.cpu import library
from hf_accel_kernels.cpu.abi import DTYPES, Batch, Decoder, DecoderLayer, fused_library
from hf_accel_kernels.packed import PackedLinear, pack, packed_linear

__all__ = ["DecoderSpec", "FusedDecoder", "LayerWeights", "Linear", "PackedLinear", "pack", "packed_linear"]

_ERRORS = {
    1: "an input id is outside the vocabulary",
    2: "a position is outside the rope tables: call set_rope with longer ones",
    3: "a slot or page is outside the pool",
    4: "query_start_loc, seq_lens, page_table and logits_indices do not fit together",
    6: "the attention op refuses these head counts or sizes",
}


class Linear(NamedTuple):
    """A dense linear: weight [N, K] and bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Linears as `torch.nn.Linear` stores them; norms [hidden_size], q_norm and k_norm [head_dim]."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    scale: float = 1.0  # of the attention scores
    sliding_window: int = 0  # 0: none; w: token i sees (i - w, i]
    use_rope: bool = True


@dataclass(frozen=True)
class DecoderSpec:
    """What the weights' shapes do not say."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    norm_eps: float
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0


class FusedDecoder:
    """embedding -> layers -> logits in one call; safe from several threads (calls are taken one at a time)."""

    def __init__(
        self,
        spec: DecoderSpec,
        layers: Sequence[LayerWeights],
        embedding: torch.Tensor,
        final_norm: torch.Tensor,
        lm_head: Linear,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        """Pack everything.

        Args:
            spec: head counts, page size, constants.
            layers: the decoder layers in order, all float32 or all bfloat16.
            embedding: [vocab_size, hidden_size], borrowed (kept alive), read in place at each call.
            final_norm: [hidden_size].
            lm_head: [vocab_size, hidden_size].
            cos, sin: rope tables [max_positions, rotary_dim]; values of the model's dtype.

        Raises:
            RuntimeError: there is no C++ library.
            ValueError: a dtype or shape that the decoder cannot take.
        """
        lib = fused_library()
        if lib is None:
            raise RuntimeError(f"the CPU ops are not available: {library.load()[1]}")
        self.spec, self.dtype = spec, embedding.dtype
        if self.dtype not in DTYPES:
            raise ValueError(f"the fused decoder takes float32 or bfloat16 weights, not {self.dtype}")
        _check_shapes(spec, layers, embedding, final_norm, lm_head)
        self._qkv = [PackedLinear((w.q[0], w.k[0], w.v[0]), (w.q[1], w.k[1], w.v[1])) for w in layers]
        self._o_proj = [PackedLinear([w.o.weight], [w.o.bias]) for w in layers]
        gates = [((w.gate[0], w.up[0]), (w.gate[1], w.up[1])) for w in layers]
        self._gate_up = [PackedLinear(weights, biases, "interleaved") for weights, biases in gates]
        self._down = [PackedLinear([w.down.weight], [w.down.bias]) for w in layers]
        self._lm_head = PackedLinear([lm_head.weight], [lm_head.bias])
        self._norms: dict[tuple[int, str], torch.Tensor] = {}
        workspace = lib.hfa_workspace_create()
        self._release = weakref.finalize(self, lib.hfa_workspace_destroy, workspace)
        self._lock = threading.Lock()
        self._layers = (DecoderLayer * len(layers))(*(self._layer(i, w) for i, w in enumerate(layers)))
        self._decoder = Decoder(
            dtype=DTYPES[self.dtype],
            num_layers=len(layers),
            hidden_size=embedding.shape[1],
            intermediate_size=layers[0].gate.weight.shape[0],
            vocab_size=lm_head.weight.shape[0],
            lm_head=self._lm_head.handle,
            layers=self._layers,
            workspace=workspace,
            **{field.name: getattr(spec, field.name) for field in fields(spec)},
        )
        self._decoder.final_norm = self._copy_norm(-1, "final_norm", final_norm)
        self.set_embedding(embedding)
        self.set_rope(cos, sin)
        self._pools: tuple[object, ...] = ()

    def _layer(self, index: int, w: LayerWeights) -> DecoderLayer:
        return DecoderLayer(
            qkv=self._qkv[index].handle,
            o_proj=self._o_proj[index].handle,
            gate_up=self._gate_up[index].handle,
            down=self._down[index].handle,
            input_norm=self._copy_norm(index, "input_norm", w.input_norm),
            post_norm=self._copy_norm(index, "post_norm", w.post_norm),
            q_norm=None if w.q_norm is None else self._copy_norm(index, "q_norm", w.q_norm),
            k_norm=None if w.k_norm is None else self._copy_norm(index, "k_norm", w.k_norm),
            scale=w.scale,
            sliding_window=w.sliding_window,
            use_rope=w.use_rope,
        )

    def _copy_norm(self, index: int, name: str, weight: torch.Tensor) -> int:
        if weight.dtype != self.dtype:
            raise ValueError(f"{name} is {weight.dtype}, the model is {self.dtype}")
        copy = weight.detach().clone(memory_format=torch.contiguous_format)
        self._norms[index, name] = copy
        return copy.data_ptr()

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed copies (the embedding table is borrowed)."""
        packed = [*self._qkv, *self._o_proj, *self._gate_up, *self._down, self._lm_head]
        return sum(p.num_bytes for p in packed) + sum(n.nbytes for n in self._norms.values())

    def set_embedding(self, embedding: torch.Tensor) -> None:
        """Borrow another embedding table [vocab_size, hidden_size]."""
        if embedding.shape[1] != self._decoder.hidden_size or embedding.dtype != self.dtype:
            raise ValueError("the embedding table does not fit the decoder")
        with self._lock:
            self._embedding = embedding.detach().contiguous()
            self._decoder.embedding = self._embedding.data_ptr()
            self._decoder.embedding_rows = self._embedding.shape[0]

    def set_rope(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rope tables [max_positions, rotary_dim], the second half of a row belonging to the rotated half."""
        if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] > self.spec.head_dim or cos.shape[1] % 2:
            raise ValueError("rope tables must be two [max_positions, even rotary_dim <= head_dim]")
        with self._lock:
            self._cos, self._sin = cos.detach().float().contiguous(), sin.detach().float().contiguous()
            self._decoder.cos, self._decoder.sin = self._cos.data_ptr(), self._sin.data_ptr()
            self._decoder.max_positions, self._decoder.rotary_dim = cos.shape

    @property
    def max_positions(self) -> int:
        """Rows of the rope tables."""
        return int(self._decoder.max_positions)

    def update(self, layer: int | None, name: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copy one weight again, in place.

        Args:
            layer: the layer's index; None for "final_norm" and "lm_head".
            name: a tensor field of `LayerWeights`, "final_norm" or "lm_head".
            weight: of the shape and dtype packed before.
            bias: a linear's bias, given exactly when it had one.
        """
        with self._lock:
            if name.endswith("norm"):
                held = self._norms[-1 if layer is None else layer, name]
                if weight.shape != held.shape or weight.dtype != held.dtype:
                    raise ValueError(f"{name}: expected {tuple(held.shape)} {held.dtype}")
                held.copy_(weight.detach())
                return
            if layer is None:
                assert name == "lm_head", name
                self._lm_head.repack(0, weight, bias)
                return
            packed, index = {
                "q": (self._qkv, 0), "k": (self._qkv, 1), "v": (self._qkv, 2), "o": (self._o_proj, 0),
                "gate": (self._gate_up, 0), "up": (self._gate_up, 1), "down": (self._down, 0),
            }[name]  # fmt: skip
            packed[layer].repack(index, weight, bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        logits_indices: torch.Tensor,
        k_pages: Sequence[torch.Tensor],
        v_pages: Sequence[torch.Tensor],
        *,
        inputs_embeds: torch.Tensor | None = None,
        num_threads: int | None = None,
    ) -> torch.Tensor:
        """One step over T tokens of S sequences; stores their keys and values, returns the logits of R rows.

        Args:
            input_ids: int64 [T]; unread with inputs_embeds.
            positions: int64 [T].
            slot_mapping: int64 [T], page * page_size + offset; negative: not stored.
            page_table: int32 [S, P].
            seq_lens: int32 [S], context lengths including this step's tokens.
            query_start_loc: int32 [S + 1].
            logits_indices: int64 [R], rows of the batch; R may be 0.
            k_pages, v_pages: per layer [num_pages, num_kv_heads, page_size, head_dim], contiguous, of the model's dtype.
            inputs_embeds: [T, hidden_size] of the model's dtype, instead of input_ids.

        Returns:
            logits float32 [R, vocab_size]; in bfloat16 models rounded to bfloat16 first.

        Raises:
            ValueError: the batch does not fit together, an id is outside the vocabulary, a page outside the pool.
        """
        positions, slot_mapping = _flat(positions, torch.int64), _flat(slot_mapping, torch.int64)
        seq_lens, query_start_loc = _flat(seq_lens, torch.int32), _flat(query_start_loc, torch.int32)
        logits_indices, page_table = _flat(logits_indices, torch.int64), page_table.to(torch.int32)
        page_table = page_table if page_table.stride(-1) == 1 else page_table.contiguous()
        start = _flat(input_ids, torch.int64) if inputs_embeds is None else inputs_embeds.to(self.dtype).contiguous()
        num_tokens, num_seqs = positions.shape[0], seq_lens.shape[0]
        if (slot_mapping.shape[0], query_start_loc.shape[0], page_table.shape[0], start.shape[0]) != (
            num_tokens, num_seqs + 1, num_seqs, num_tokens,
        ):  # fmt: skip
            raise ValueError("input_ids, positions, slot_mapping, page_table, seq_lens and query_start_loc do not fit")
        logits = torch.empty(logits_indices.shape[0], self._decoder.vocab_size)
        batch = Batch(
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            num_logits=logits_indices.shape[0],
            page_table_stride=page_table.stride(0) if num_seqs > 1 else page_table.shape[1],
            input_ids=start.data_ptr() if inputs_embeds is None else None,
            hidden=None if inputs_embeds is None else start.data_ptr(),
            positions=positions.data_ptr(),
            slot_mapping=slot_mapping.data_ptr(),
            page_table=page_table.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            query_start_loc=query_start_loc.data_ptr(),
            logits_indices=logits_indices.data_ptr(),
            logits=logits.data_ptr(),
            num_threads=torch.get_num_threads() if num_threads is None else num_threads,
        )
        self._run(batch, k_pages, v_pages)
        return logits

    def _run(self, batch: Batch, k_pages: Sequence[torch.Tensor], v_pages: Sequence[torch.Tensor]) -> None:
        lib = fused_library()
        assert lib is not None
        with self._lock:
            batch.k_pages, batch.v_pages, batch.num_pages = self._page_pointers(k_pages, v_pages)
            error = lib.hfa_decoder_forward(ctypes.byref(self._decoder), ctypes.byref(batch))
        if error == 5:
            raise MemoryError(f"no memory for a step of {batch.num_tokens} tokens")
        if error:
            raise ValueError(_ERRORS[error])

    def _page_pointers(self, k_pages: Sequence[torch.Tensor], v_pages: Sequence[torch.Tensor]) -> tuple[int, int, int]:
        """Addresses of the pointer arrays [num_layers] for keys and values, and the number of pages."""
        addresses = tuple(t.data_ptr() for pages in (k_pages, v_pages) for t in pages)
        if self._pools and self._pools[0] == addresses and self._pools[1] == k_pages[0].shape:
            _, _, arrays = self._pools
        else:
            spec, count = self.spec, len(self._layers)
            shape = (k_pages[0].shape[0], spec.num_kv_heads, spec.page_size, spec.head_dim)
            if len(k_pages) != count or len(v_pages) != count:
                raise ValueError(f"expected {count} key pools and {count} value pools")
            for t in (*k_pages, *v_pages):
                if tuple(t.shape) != shape or t.dtype != self.dtype or not t.is_contiguous():
                    raise ValueError(
                        f"expected contiguous pages {shape} of {self.dtype}, got {tuple(t.shape)} of {t.dtype}"
                    )
            arrays = ((ctypes.c_void_p * count)(*addresses[:count]), (ctypes.c_void_p * count)(*addresses[count:]))
            self._pools = (addresses, k_pages[0].shape, arrays)
        return ctypes.addressof(arrays[0]), ctypes.addressof(arrays[1]), k_pages[0].shape[0]


def _flat(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


def _check_shapes(
    spec: DecoderSpec,
    layers: Sequence[LayerWeights],
    embedding: torch.Tensor,
    final_norm: torch.Tensor,
    lm_head: Linear,
) -> None:
    hidden, inter = embedding.shape[1], layers[0].gate.weight.shape[0]
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = {
        "q": (heads, hidden), "k": (kv_heads, hidden), "v": (kv_heads, hidden), "o": (hidden, heads),
        "gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter),
    }  # fmt: skip
    norms = {"input_norm": hidden, "post_norm": hidden, "q_norm": spec.head_dim, "k_norm": spec.head_dim}
    for i, layer in enumerate(layers):
        for name, shape in linears.items():
            if tuple(getattr(layer, name).weight.shape) != shape:
                raise ValueError(f"layer {i}: {name} is {tuple(getattr(layer, name).weight.shape)}, expected {shape}")
        for name, size in norms.items():
            weight = getattr(layer, name)
            if weight is not None and tuple(weight.shape) != (size,):
                raise ValueError(f"layer {i}: {name} is {tuple(weight.shape)}, expected {(size,)}")
    if lm_head.weight.shape[1] != hidden or tuple(final_norm.shape) != (hidden,):
        raise ValueError("lm_head and final_norm do not fit the embedding table")
