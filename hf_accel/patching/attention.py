"""The attention seam: one function registered with transformers' AttentionInterface, and the switch that turns it on.

Owns the registry entries and, while a step runs, the model's `_attn_implementation`. Between steps the configuration is
the user's own, so saving, pickling and copying a model see nothing of us. Knows no model family.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_accel.patching.config_switch import ConfigSwitch


class LayerAttention(Protocol):
    """What the keyword `forward_batch` of a model's forward must be."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Attention of one layer over packed tokens.

        Args:
            module: the attention module, with `layer_idx`.
            query: [1, num_heads, num_tokens, head_dim], rotated and normed.
            key: [1, num_kv_heads, num_tokens, head_dim].
            value: [1, num_kv_heads, num_tokens, v_head_dim].
            scaling: factor of the scores; None: head_dim ** -0.5.
            options: the other keywords that the model passed (sliding_window, softcap, s_aux, ...).

        Returns:
            [1, num_tokens, num_heads, v_head_dim].
        """
        ...


_names: dict[str | None, str] = {}
_switch = ConfigSwitch("_attn_implementation_internal")


def _registered_name(original: str | None) -> str:
    """The interface entry that stands in for `original`: paged with a `forward_batch`, `original` without one."""
    if original not in _names:
        name = f"hf_accel_{len(_names)}"
        AttentionInterface.register(name, _make_attention(original))
        if original in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        _names[original] = name
    return _names[original]


def _make_attention(original: str | None) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def hf_accel_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        forward_batch: LayerAttention | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if forward_batch is None:
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            function = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        if original == "sdpa":  # it has no soft cap: older transformers leave it out, newer ones refuse
            kwargs.pop("softcap", None)
        scaling = kwargs.pop("scaling", None)
        return forward_batch.attend(module, query, key, value, scaling, kwargs), None

    return hf_accel_attention


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configuration objects that the model and its submodules read the attention implementation from."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def paged_attention_on(configs: list[Any]) -> contextlib.AbstractContextManager[None]:
    """While open, models that read `configs` attend through us."""
    return attention_replaced(configs, None)


def attention_replaced(configs: list[Any], name: str | None) -> contextlib.AbstractContextManager[None]:
    """While open, `configs` name the interface entry `name`, or the paged one that stands in for their own."""
    return _switch.on(configs, lambda original: name or _registered_name(original))
