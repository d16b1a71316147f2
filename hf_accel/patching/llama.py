"""A plain dense Llama-like HF model as one fused CPU step: reads the user's module, never writes to it.

Owns the map from HF's module names to the fused decoder's weights, and the rope tables. Does not know when weights
change (the engine calls `refresh`), nor who schedules the batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

import torch
from torch import nn

from hf_accel.patching.llama_structure import (
    Snapshot,
    decoder_layers,
    family_of,
    layer_windows,
    why_not_plain,
)
from hf_accel_kernels.cpu import library
from hf_accel_kernels.fused import DecoderSpec, FusedDecoder, LayerWeights, Linear

_FIRST_POSITIONS = 2048  # rows of the rope tables before the first long sequence

# Field of LayerWeights -> where HF's layer keeps it.
_LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def fused_decoder_for(model: nn.Module, *, page_size: int, max_positions: int) -> tuple[FusedDecoderModel | None, str]:
    """The model's fused CPU step, or None and the reason why it has none.

    Args:
        model: an HF causal language model, left as it is; held weakly.
        page_size: tokens of a KV page.
        max_positions: the longest sequence expected; the rope tables start no longer than this and grow on demand.

    Returns:
        (fused model, "") or (None, reason). Packing copies every linear once: see `num_bytes`.
    """
    if library.load()[0] is None:
        return None, library.load()[1]
    reason = why_not_plain(model)
    if reason:
        return None, reason
    return FusedDecoderModel(model, page_size=page_size, max_positions=max_positions), ""


class FusedDecoderModel:
    """The fused decoder of one HF model; make it with `fused_decoder_for`."""

    def __init__(self, model: nn.Module, *, page_size: int, max_positions: int) -> None:
        self._model = weakref.ref(model)
        self._snapshot = Snapshot(model)
        family, layers = family_of(model), decoder_layers(model)
        attention = layers[0].self_attn
        spec = DecoderSpec(
            num_heads=attention.q_proj.out_features // attention.head_dim,
            num_kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            page_size=page_size,
            norm_eps=model.model.norm.variance_epsilon,
            embedding_multiplier=model.model.embedding_multiplier if family.multipliers else 1.0,
            residual_multiplier=layers[0].residual_multiplier if family.multipliers else 1.0,
            logits_divisor=model.config.logits_scaling if family.multipliers else 1.0,
        )
        norms = _NORMS | (_QK_NORMS if family.qk_norm else {})
        windows = layer_windows(model, family)
        weights = [
            LayerWeights(
                **{field: _linear(layer.get_submodule(path)) for field, path in _LINEARS.items()},
                **{field: layer.get_submodule(path).weight for field, path in norms.items()},
                scale=layer.self_attn.scaling,
                sliding_window=window,
                use_rope=bool(layer.self_attn.use_rope) if family.nope else True,
            )
            for layer, window in zip(layers, windows, strict=True)
        ]
        self._norms = norms
        cos, sin = rope_tables(model, min(max_positions, _FIRST_POSITIONS))
        embedding, head = model.model.embed_tokens.weight, _linear(model.lm_head)
        self._decoder = FusedDecoder(spec, weights, embedding, model.model.norm.weight, head, cos, sin)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed copy of the weights."""
        return self._decoder.num_bytes

    def still_valid(self, model: nn.Module) -> bool:
        """Whether the fused step still computes what this model's forward would; see `why_not_valid`."""
        return not self.why_not_valid(model)

    def why_not_valid(self, model: nn.Module) -> str:
        """ "" while the model is the one packed, in eval mode, with no hook, adapter, compiled or replaced part."""
        return "another model" if model is not self._model() else self._snapshot.why_changed(model)

    def refresh(self, names: Collection[str] | None = None) -> str:
        """Pack the weights again after a change, in place.

        Args:
            names: names of the changed parameters as in `named_parameters()`; None for all.

        Returns:
            "", or the reason why the model has no fused step any more (then nothing should be run).
        """
        model = self._model()
        if model is None:
            return "the model is gone"
        reason = why_not_plain(model) or self.why_not_valid(model)
        if reason:
            return reason

        def changed(path: str) -> bool:
            return names is None or f"{path}.weight" in names or f"{path}.bias" in names

        for index, layer in enumerate(decoder_layers(model)):
            for field, path in _LINEARS.items():
                if changed(f"model.layers.{index}.{path}"):
                    self._decoder.update(index, field, *_linear(layer.get_submodule(path)))
            for field, path in self._norms.items():
                if changed(f"model.layers.{index}.{path}"):
                    self._decoder.update(index, field, layer.get_submodule(path).weight)
        self._decoder.set_embedding(model.model.embed_tokens.weight)
        if changed("model.norm"):
            self._decoder.update(None, "final_norm", model.model.norm.weight)
        if changed("lm_head") or changed("model.embed_tokens"):  # tied weights go by the embedding's name
            self._decoder.update(None, "lm_head", *_linear(model.lm_head))
        return ""

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
        num_positions: int | None = None,
    ) -> torch.Tensor:
        """One step over paged KV; arguments and errors are those of `FusedDecoder.forward`.

        Args:
            num_positions: the highest position and one, where the caller knows it on the host.

        Returns:
            logits float32 [R, vocab_size].
        """
        needed = int(positions.max()) + 1 if num_positions is None else num_positions
        if needed > self._decoder.max_positions:
            model = self._model()
            if model is None:
                raise ValueError("the model is gone: its rope tables cannot grow")
            self._decoder.set_rope(*rope_tables(model, max(needed, 2 * self._decoder.max_positions)))
        return self._decoder.forward(
            input_ids, positions, slot_mapping, page_table, seq_lens, query_start_loc, logits_indices, k_pages, v_pages
        )


def rope_tables(model: nn.Module, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotary_dim] float32 of positions 0..length-1 on the model's device, computed by its own rotary
    embedding and rounded to its dtype."""
    weight = model.lm_head.weight
    like = torch.empty(1, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(like, position_ids=torch.arange(length, device=weight.device).unsqueeze(0))
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def _linear(module: nn.Module) -> Linear:
    return Linear(module.weight, module.bias)
