"""Says why a `generate` call must go to HF's own code. Reads the model and the call; decides nothing else.

Every function returns "" when the fast path reproduces HF's answer, otherwise the reason in words.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationConfig

from hf_accel.patching.llama_structure import is_user_hook

if TYPE_CHECKING:
    from hf_accel.patching.registry import ModelSpec

HARMLESS_KWARGS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position", "tokenizer"}
)


def model_reason(model: PreTrainedModel) -> str:
    """Whether the model is in a state (mode, devices, wrappers) whose forward the engine does not run."""
    if model.training and _has_dropout(model):
        return "the model is in training mode with active dropout"
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return "the model is in training mode with gradient checkpointing"
    if model.device.type == "meta" or any(_offloads(m) for m in model.modules()):
        return "weights are offloaded by accelerate"
    device_map = getattr(model, "hf_device_map", None) or {}
    if len(set(map(str, device_map.values()))) > 1:
        return "the model is spread over several devices (hf_device_map)"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if is_compiled(model):
        return "the model or one of its modules is compiled by torch.compile"
    if any(_chooses_adapters_by_row(h) for m in model.modules() for h in m._forward_pre_hooks.values()):
        return "PEFT adapters chosen for each row (adapter_names)"
    return _prepare_inputs_reason(model)


def call_reason(
    input_ids: torch.Tensor, config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> str:
    """Whether the call asks for something that only HF's own loop gives."""
    if synced_gpus:
        return "synced_gpus (FSDP or ZeRO-3)"
    if getattr(config, "is_assistant", False):
        return "the model is the assistant of another generation"
    if config.return_dict_in_generate and config.output_attentions:
        return "output_attentions"
    if config.return_dict_in_generate and config.output_hidden_states:
        return "output_hidden_states"
    if not config.use_cache:
        return "use_cache=False"
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        return f"cache_implementation={config.cache_implementation!r}"
    if config.guidance_scale is not None and config.guidance_scale != 1:
        return "guidance_scale"
    if input_ids.numel() == 0 or input_ids.dim() != 2:
        return "the prompt has no token ids"
    if input_ids.dtype not in (torch.int64, torch.int32):
        return f"token ids of {input_ids.dtype}"
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (
        type(cache) is not DynamicCache or getattr(cache, "_is_user_defined", False) or cache.get_seq_length()
    ):
        return "past_key_values given by the caller"
    unknown = sorted(k for k, v in model_kwargs.items() if k not in HARMLESS_KWARGS and v is not None)
    if unknown:
        return f"model argument(s) {', '.join(unknown)}"
    return _mask_reason(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))


def window_reason(spec: ModelSpec, mask: torch.Tensor | None) -> str:
    """Whether masked tokens lie inside a prompt of a model with sliding windows: they have no position, but fill a window."""
    if mask is None or not spec.has_windows:
        return ""
    started = mask.bool().cummax(dim=-1).values if mask.dim() == 2 else mask.bool()
    return (
        "an attention_mask with holes, in a model with sliding windows" if bool((started & ~mask.bool()).any()) else ""
    )


def padding_reason(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None) -> str:
    """Whether masked tokens have NaN embeddings: the engine leaves them out, in HF's attention 0 * NaN spoils their row."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if mask is None or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return ""
    ids = input_ids[mask.to(input_ids.device) == 0]
    if not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
        return ""
    if bool((ids == ids[0]).all()):  # the padding token
        ids = ids[:1]
    return (
        ""
        if bool(weight[ids.to(weight.device)].isfinite().all())
        else "a masked token whose embedding is NaN or infinite"
    )


def _checkpoints_activations(model: PreTrainedModel) -> bool:
    new_name = "is_activation_checkpointing"  # transformers 5.23; the old one warns there
    return bool(getattr(model, new_name if hasattr(type(model), new_name) else "is_gradient_checkpointing", False))


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to the model or to one of its modules."""
    return any(
        m.__dict__.get("_compiled_call_impl") is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )


def has_user_hooks(model: nn.Module) -> bool:
    """Whether forward hooks may change, or watch, what a token's layers compute: its KV must then be computed anew."""
    return module_hooks._has_any_global_hook() or any(
        is_user_hook(hook)
        for m in model.modules()
        for hooks in (m._forward_hooks, m._forward_pre_hooks)
        for hook in hooks.values()
    )


def _mask_reason(input_ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> str:
    if mask is not None:
        if mask.shape != input_ids.shape:
            return "an attention_mask of another shape than input_ids"
        if bool(((mask != 0) & (mask != 1)).any()):
            return "an attention_mask with values other than 0 and 1"
        if not bool(mask[:, -1].all()):
            return "an attention_mask that hides the last token"
    if position_ids is not None:
        length = input_ids.shape[1]
        expected = torch.arange(length, device=position_ids.device)[None]
        if mask is not None:
            mask = mask.to(position_ids.device).long()
            expected = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        same = position_ids.shape[-1] == length and position_ids.dim() == 2
        real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.bool()
        if not same or not bool((position_ids == expected)[real.expand_as(position_ids == expected)].all()):
            return "position_ids given by the caller"
    return ""


def _prepare_inputs_reason(model: PreTrainedModel) -> str:
    own = type(model).prepare_inputs_for_generation
    override = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(override, "__self__", None)
    put_back = owner is model and getattr(override, "__func__", None) is own  # PEFT leaves the model's own method so
    if override is not None and not put_back:
        configs = getattr(owner, "peft_config", None)
        if owner is model or not isinstance(configs, dict):
            return "prepare_inputs_for_generation is replaced on the model"
        if any(getattr(c, "is_prompt_learning", False) for c in configs.values()):
            return "PEFT prompt learning"
    if own is not GenerationMixin.prepare_inputs_for_generation and not own.__module__.startswith("transformers."):
        return "the model has its own prepare_inputs_for_generation"
    if vars(model).get("forward") is not None and not hasattr(model, "_hf_hook"):
        return "the model's forward is replaced on the instance"
    return ""


def _chooses_adapters_by_row(hook: Any) -> bool:
    """PEFT's temporary hooks split the batch by rows, which a packed batch does not have."""
    return isinstance(hook, functools.partial) and hook.func.__module__.startswith("peft.")


def _has_dropout(model: nn.Module) -> bool:
    return any(getattr(m, "p", 0) > 0 and "Dropout" in type(m).__name__ for m in model.modules()) or any(
        getattr(m, name, 0)
        for m in model.modules()
        for name in ("attention_dropout", "dropout")
        if isinstance(getattr(m, name, 0), float)
    )


def _offloads(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(h, "offload", False) for h in hooks)
