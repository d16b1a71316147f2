"""A plain dense Llama-like HF model as our own loop over its layers, for devices: few large products, few small kernels.

Owns the map from HF's modules to the loop's tensors, the parameters fused for it and the rope tables. Computes what the
model's own forward does, with roundings in the same places. Does not know when weights change (the engine calls `refresh`),
nor who schedules the batches. No host sync, no choice that depends on data of the device: a step may be captured in a graph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hf_accel.attention.base import AttentionBackend, AttentionMetadata
from hf_accel.patching.fused_parameters import FusedParameters, lying_together, why_not_movable
from hf_accel.patching.llama import rope_tables
from hf_accel.patching.llama_structure import Snapshot, decoder_layers, family_of, layer_windows, why_not_plain
from hf_accel_kernels.rms_norm import add_rms_norm, rms_norm
from hf_accel_kernels.rope_and_store import rope_and_store, split_qkv
from hf_accel_kernels.swiglu import swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_layout_versions = itertools.count()

# What one product computes -> the linears of HF's layer, in the order of their rows.
_GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}

_Product = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias, as F.linear takes them


@dataclass(frozen=True)
class _Layer:
    """One layer's tensors, all of them the model's own memory, and constants."""

    qkv: _Product
    o_proj: _Product
    gate_up: _Product
    down_proj: _Product
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    scale: float
    sliding_window: int
    use_rope: bool


def device_forward_for(model: nn.Module, *, max_positions: int) -> tuple[DeviceForward | None, str]:
    """The model's loop, or None and the reason why it has none.

    Args:
        model: an HF causal language model, held weakly. Its q, k and v weights of a layer move into one tensor, its gate and up
            weights into another, until `close`; at any time one layer's at most are held twice.
        max_positions: rows of the rope tables; see `ensure_positions`.
    """
    reason = why_not_plain(model, device=model.lm_head.weight.device, dtypes=DTYPES) or _why_not_fusable(model)
    if reason:
        return None, reason
    try:
        return DeviceForward(model, max_positions=max_positions), ""
    except torch.OutOfMemoryError:
        return None, "no memory to move one layer's weights in"


class DeviceForward:
    """The loop over the layers of one HF model; make it with `device_forward_for`."""

    def __init__(self, model: nn.Module, *, max_positions: int) -> None:
        self._model = weakref.ref(model)
        self._snapshot = Snapshot(model)
        family, attention = family_of(model), decoder_layers(model)[0].self_attn
        self._head_dim: int = attention.head_dim
        self._num_heads = attention.q_proj.out_features // self._head_dim
        self._num_kv_heads = attention.k_proj.out_features // self._head_dim
        self._eps: float = model.model.norm.variance_epsilon
        scaled = family.multipliers
        self._embedding_multiplier: float = model.model.embedding_multiplier if scaled else 1.0
        self._residual_multiplier: float = decoder_layers(model)[0].residual_multiplier if scaled else 1.0
        self._logits_divisor: float = model.config.logits_scaling if scaled else 1.0
        self._cos, self._sin = rope_tables(model, max_positions)
        self.layout_version = next(_layout_versions)
        """Changes whenever a tensor that `forward` reads may have moved, and no two loops share one: graphs that baked addresses
        in must then be captured again."""
        self._layers: list[_Layer] = []
        self._ends: tuple[torch.Tensor, torch.Tensor, _Product] | None = None  # embedding, final norm, head
        self._read_at: list[int] = []
        self._fused: list[dict[tuple[str, str], FusedParameters]] = []
        try:
            self._fuse(model)
        except BaseException:
            self.close()
            raise
        self._read(model)

    def _fuse(self, model: nn.Module) -> None:
        for layer in decoder_layers(model):
            self._fused.append({})
            for group, paths in _GROUPS.items():
                linears = [layer.get_submodule(path) for path in paths]
                for name in ("weight", "bias"):
                    if linears[0]._parameters[name] is not None:
                        self._fused[-1][group, name] = FusedParameters(linears, name)

    def _read(self, model: nn.Module) -> None:
        """Refer to the model's tensors as they are now."""
        family, windows = family_of(model), layer_windows(model, family_of(model))
        self._layers = []
        for layer, fused, window in zip(decoder_layers(model), self._fused, windows, strict=True):
            attention = layer.self_attn
            groups = {
                group: (
                    fused[group, "weight"].tensor,
                    fused[group, "bias"].tensor if (group, "bias") in fused else None,
                )
                for group in _GROUPS
            }
            self._layers.append(
                _Layer(
                    **groups,
                    o_proj=_linear(attention.o_proj),
                    down_proj=_linear(layer.mlp.down_proj),
                    input_norm=layer.input_layernorm.weight.detach(),
                    post_norm=layer.post_attention_layernorm.weight.detach(),
                    q_norm=attention.q_norm.weight.detach() if family.qk_norm else None,
                    k_norm=attention.k_norm.weight.detach() if family.qk_norm else None,
                    scale=attention.scaling,
                    sliding_window=window,
                    use_rope=bool(attention.use_rope) if family.nope else True,
                )
            )
        embedding, final_norm = model.model.embed_tokens.weight.detach(), model.model.norm.weight.detach()
        self._ends = (embedding, final_norm, _linear(model.lm_head))
        addresses = self._addresses()
        if addresses != self._read_at:
            self._read_at = addresses
            self.layout_version = next(_layout_versions)

    def _addresses(self) -> list[int]:
        fields = [value for layer in self._layers for value in vars(layer).values()]
        fields += self._ends or ()
        tensors = [t for field in fields for t in (field if isinstance(field, tuple) else (field,))]
        return [t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)]

    def why_not_valid(self, model: nn.Module) -> str:
        """ "" while the model is the one read, in eval mode, with no hook, adapter, compiled or replaced part."""
        return "another model" if model is not self._model() else self._snapshot.why_changed(model)

    def refresh(self) -> str:
        """Follow a weight change. Writes in place need nothing; parameters that got other memory are made views again.

        Returns:
            "", or the reason why the model has no loop any more (then `close` it).
        """
        model = self._model()
        if model is None:
            return "the model is gone"
        reason = why_not_plain(model, device=model.lm_head.weight.device, dtypes=DTYPES) or self.why_not_valid(model)
        reason = reason or self._why_not_followed(model)
        if not reason:
            self._read(model)
        return reason

    def _why_not_followed(self, model: nn.Module) -> str:
        groups = [group for fused in self._fused for group in fused.values()]
        if not all(group.fits() for group in groups):
            return "weights changed their shapes"
        strays = [p for group in groups for p in group.strays()]
        reason = _why_not_read(model) or why_not_movable([("a weight that got other memory", p) for p in strays])
        if not reason:
            for group in groups:
                group.follow()
        return reason

    def ensure_positions(self, num_positions: int) -> None:
        """Let the rope tables cover so many positions; they may move (see `layout_version`). Call it outside of a capture."""
        if num_positions <= len(self._cos):
            return
        model = self._model()
        if model is None:
            raise ValueError("the model is gone: its rope tables cannot grow")
        self._cos, self._sin = rope_tables(model, max(num_positions, 2 * len(self._cos)))
        self.layout_version = next(_layout_versions)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_indices: torch.Tensor,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
        k_pages: Sequence[torch.Tensor],
        v_pages: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """One step over paged KV.

        Args:
            input_ids: [num_tokens] int64.
            positions: [num_tokens] int64, covered by the rope tables.
            logits_indices: [num_logits] int64, rows of the step.
            backend: attends.
            metadata: of the step, planned by `backend`.
            k_pages: per layer [num_pages, num_kv_heads, page_size, head_dim] of the model's dtype; written.
            v_pages: likewise.

        Returns:
            logits float32 [num_logits, vocab_size], rounded to the model's dtype first.
        """
        assert self._ends is not None, "closed"
        embedding, final_norm, head = self._ends
        residual = F.embedding(input_ids, embedding)
        if self._embedding_multiplier != 1.0:
            residual = residual * self._embedding_multiplier
        normed = rms_norm(residual, self._layers[0].input_norm, self._eps)
        for index, layer in enumerate(self._layers):
            pages = (k_pages[index], v_pages[index])
            out = F.linear(self._attend(layer, normed, positions, backend, metadata, *pages), *layer.o_proj)
            last = index + 1 == len(self._layers)
            if last:  # nothing else reads the other rows
                out, residual = out.index_select(0, logits_indices), residual.index_select(0, logits_indices)
            normed, residual = self._add_and_norm(out, residual, layer.post_norm)
            out = F.linear(swiglu(F.linear(normed, *layer.gate_up)), *layer.down_proj)
            next_norm = final_norm if last else self._layers[index + 1].input_norm
            normed, residual = self._add_and_norm(out, residual, next_norm)
        logits = F.linear(normed, *head)
        return (logits if self._logits_divisor == 1.0 else logits / self._logits_divisor).float()

    def _attend(
        self,
        layer: _Layer,
        normed: torch.Tensor,
        positions: torch.Tensor,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> torch.Tensor:
        """[num_tokens, num_heads * head_dim]."""
        q, k, v = split_qkv(F.linear(normed, *layer.qkv), self._num_heads, self._num_kv_heads, self._head_dim)
        tables = (self._cos, self._sin) if layer.use_rope else (None, None)
        q = rope_and_store(
            q,
            k,
            v,
            positions,
            *tables,
            k_pages,
            v_pages,
            metadata.slot_mapping,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self._eps,
        )
        out = backend.attend(
            q, k_pages, v_pages, metadata, scale=layer.scale, sliding_window=layer.sliding_window
        )  # [num_tokens, num_heads, head_dim]
        return out.flatten(1)

    def _add_and_norm(
        self, out: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(out, residual, weight, self._eps, scale=self._residual_multiplier)

    def close(self) -> None:
        """Give every parameter memory of its own back, and let go of all; the object is of no use afterwards."""
        for fused in self._fused:
            for group in fused.values():
                group.release()
            fused.clear()
        self._layers, self._ends = [], None


def _why_not_fusable(model: nn.Module) -> str:
    moving = []
    for index, layer in enumerate(decoder_layers(model)):
        for paths in _GROUPS.values():
            linears = [layer.get_submodule(path) for path in paths]
            for name in ("weight", "bias"):
                parameters = [linear._parameters[name] for linear in linears]
                if all(p is None for p in parameters):
                    continue
                if any(p is None for p in parameters):
                    return f"only some of {', '.join(paths)} have a bias"
                if lying_together(parameters) is None:
                    moving += [(f"layers.{index}.{path}.{name}", p) for path, p in zip(paths, parameters, strict=True)]
    return _why_not_read(model) or why_not_movable(moving)


def _why_not_read(model: nn.Module) -> str:
    """ "" unless a parameter of a layer stands in the model twice, or a norm's weight has gaps."""
    seen: dict[int, str] = {}
    if not model.model.norm.weight.is_contiguous():
        return "norm.weight is not contiguous"
    for name, parameter in model.model.layers.named_parameters(remove_duplicate=False):
        if parameter.dim() == 1 and not parameter.is_contiguous():
            return f"layers.{name} is not contiguous"
        other = seen.setdefault(id(parameter), name)
        if other != name:
            return f"layers.{name} and layers.{other} are one parameter"
    return ""


def _linear(module: nn.Module) -> _Product:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()
