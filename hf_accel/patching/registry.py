"""Which models can be accelerated, and what an engine must know of one. Reads HF configurations and modules; changes none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from hf_accel.kv_cache.mla_pool import LatentShape
from hf_accel.kv_cache.pool import LayerShape
from hf_accel.patching.attention import attention_configs
from hf_accel.patching.deepseek import why_not_latent
from hf_accel.patching.probe import Probe

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
UNSUPPORTED_ATTRIBUTES = {
    "num_kv_shared_layers": "its layers share KV with each other",
    "attention_chunk_size": "it uses chunked attention",
    "mamba_d_state": "it has state-space (mamba) layers",
    "ssm_state_size": "it has state-space (mamba) layers",
    "linear_num_key_heads": "it has linear-attention layers",
}


class UnsupportedModelError(ValueError):
    """The model cannot be accelerated; the message names the reason. `model.generate` keeps working as it was."""


@dataclass(frozen=True)
class ModelSpec:
    """What the engine needs to know of a model.

    Attributes:
        layers: KV shape of each attention layer, by `layer_idx`: all keys and values, or all latents.
        vocab_size: size of the logits.
        max_positions: longest sequence that the model was made for, in tokens.
        static_positions: rope is the same at every length up to this one (longrope and dynamic rope switch past it).
        has_windows: some layer attends through a sliding window.
        configs: the configuration objects to switch while a step runs.
    """

    layers: tuple[LayerShape, ...] | tuple[LatentShape, ...]
    vocab_size: int
    max_positions: int
    static_positions: int | None
    has_windows: bool
    configs: list[Any]


def base_model(model: nn.Module) -> PreTrainedModel:
    """The HF model itself, where `model` may be a PEFT wrapper around it."""
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, PreTrainedModel):
        raise UnsupportedModelError(
            "the model is wrapped by torch.compile: patch the model itself, before compiling it"
        )
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise UnsupportedModelError(
            f"expected a transformers causal language model with `generate`, got {type(model).__name__}"
        )
    return model


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the reason, for a model that cannot run on a paged KV cache."""
    config, name = model.config, type(model).__name__

    def refuse(reason: str) -> None:
        raise UnsupportedModelError(f"{name} cannot be accelerated: {reason}")

    if getattr(config, "is_encoder_decoder", False):
        refuse("it is an encoder-decoder")
    text = config.get_text_config(decoder=True)
    if text is not config:
        refuse("it is a multimodal model; only text decoders are supported")
    for attribute, reason in UNSUPPORTED_ATTRIBUTES.items():
        if getattr(config, attribute, None):
            refuse(reason)
    if getattr(config, "kv_lora_rank", None) and (reason := why_not_latent(model)):
        refuse(reason)
    types = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if types:
        refuse(f"it has layers of type {', '.join(sorted(types))}; only full and sliding attention are supported")
    if getattr(config, "use_bidirectional_attention", False):
        refuse("it attends in both directions")
    if not getattr(model, "_supports_attention_backend", False):
        refuse("its attention does not go through transformers' AttentionInterface")
    if model.device.type == "meta" and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        refuse("its weights are not loaded (they are on the meta device)")
    if getattr(model, "_is_stateful", False):
        refuse("it keeps a recurrent state instead of a KV cache")


def read_spec(model: PreTrainedModel) -> ModelSpec:
    """Learn the model's KV shapes by running two tokens through it (hooks of the user do not fire).

    Raises:
        UnsupportedModelError: a layer's attention does not reach the interface, or needs something we do not implement.
    """
    check_supported(model)

    def refuse(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{type(model).__name__} cannot be accelerated: {reason}")

    static_positions = _static_positions(model.config)
    probe = Probe(static_positions)
    try:
        probe.run(model)
    except TypeError as error:
        raise refuse(f"its forward refused a keyword: {error}") from error
    expected = model.config.num_hidden_layers
    missing = sorted(set(range(expected)) - set(probe.layers))
    if missing or len(probe.layers) != expected:
        raise refuse(f"the attention of layers {missing} does not go through transformers' AttentionInterface")
    if probe.problems:
        raise refuse("; ".join(sorted(probe.problems)))
    return ModelSpec(
        layers=tuple(probe.layers[i] for i in range(expected)),
        vocab_size=probe.vocab_size,
        max_positions=getattr(model.config, "max_position_embeddings", None) or 1 << 20,
        static_positions=static_positions,
        has_windows=any(probe.windows.values()),
        configs=attention_configs(model),
    )


def _static_positions(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    variants = list(rope.values()) if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    if not any(v.get("rope_type", v.get("type")) in ("dynamic", "longrope") for v in variants if isinstance(v, dict)):
        return None
    original = getattr(config, "original_max_position_embeddings", None)
    for v in variants:
        original = v.get("original_max_position_embeddings") or original
    return original or config.max_position_embeddings
