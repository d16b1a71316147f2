"""Learns how a model attends by running two tokens through it, with an attention that looks at no other token.

Owns what is read off each layer's call: shapes, options, and the rule behind its mask. What the engine could not reproduce
becomes a reason in words. Leaves the model, its hooks and its configuration as they were; knows no model family.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from hf_accel.kv_cache.mla_pool import LatentShape
from hf_accel.kv_cache.pool import LayerShape
from hf_accel.patching.attention import attention_configs, attention_replaced
from hf_accel.patching.deepseek import latent_modules, latents_passed_on
from hf_accel.patching.eligibility import is_compiled

KNOWN_OPTIONS = frozenset(
    {
        "dropout", "sliding_window", "softcap", "s_aux", "position_ids", "cache_position", "is_causal", "use_cache",
        "output_attentions", "output_hidden_states", "position_embeddings", "return_dict", "output_router_logits",
        "logits_to_keep", "past_key_value",
    }
)  # fmt: skip
MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' `mask_function(batch, head, query position, key position)`: may the query see the key?"""

FAR = 1 << 20
"""A position beyond every context length."""

LEAK_TOLERANCE = 0.05
"""Relative difference of logits that rounding may make when another token of the batch changes."""

_NAME = "hf_accel_probe"
_current: contextvars.ContextVar[Probe] = contextvars.ContextVar("hf_accel_probe")


class Probe:
    """What one model's layers passed to the attention function.

    Attributes:
        layers: KV shapes by `layer_idx`.
        windows: sliding window of each layer, 0 for none.
        problems: why the model cannot run on a paged KV cache; empty if it can.
        vocab_size: size of the logits.

    Args:
        static_positions: longest sequence that will ever run through the engine, None for no limit.
    """

    def __init__(self, static_positions: int | None) -> None:
        self.layers: dict[int, LayerShape | LatentShape] = {}
        self.problems: set[str] = set()
        self.vocab_size = 0
        self._far = FAR if static_positions is None else static_positions - 1
        self.windows: dict[int, int] = {}
        self._rules: dict[int, MaskRule] = {}
        self._masks: list[torch.Tensor] = []  # kept, so that their addresses stay theirs
        self._seen_this_time: set[int] = set()
        self._latent: frozenset[int] = frozenset()

    @torch.no_grad()
    def run(self, model: PreTrainedModel) -> None:
        """Fill the attributes. Raises TypeError where the model's forward refuses the extra keyword."""
        latent = latent_modules(model) if getattr(model.config, "kv_lora_rank", None) else []
        replaced = attention_replaced(attention_configs(model), _registered())
        with _undisturbed(model), replaced, latents_passed_on(latent):
            self._latent = frozenset(map(id, latent))
            token = _current.set(self)
            try:
                first, second = self._forward(model, 0), self._forward(model, 2)
            finally:
                _current.reset(token)
        self.vocab_size = first.shape[-1]
        self._check_cache(model)
        finite = first[-1].isfinite() & second[-1].isfinite()
        first, second = first[-1][finite], second[-1][finite]
        if not len(first):
            self.problems.add("its logits are NaN or infinite: look for NaN in its weights, or run it in a wider dtype")
        elif not float((first - second).abs().max()) <= LEAK_TOLERANCE * float(first.abs().max()):
            self.problems.add("tokens reach each other outside of attention (a convolution or recurrence)")

    def _forward(self, model: PreTrainedModel, first_id: int) -> torch.Tensor:
        self._seen_this_time.clear()
        device = _input_device(model)
        output = model(
            input_ids=torch.tensor([[first_id, 1]], device=device),
            position_ids=torch.tensor([[0, 1]], device=device),
            attention_mask=None,
            use_cache=False,
            forward_batch=self,
        )
        return output.logits[0].float()  # [2, vocab_size]

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Write the call down; the output is each token's own value. Shapes as in `LayerAttention`."""
        if module.layer_idx in self._seen_this_time:
            self.problems.add("a layer attends more than once")
        self._seen_this_time.add(module.layer_idx)
        if id(module) in self._latent:
            self.layers[module.layer_idx] = LatentShape(key.shape[3], value.shape[3])
            key, value = type(module).expand_kv(module, key, value)
        else:
            self.layers[module.layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        unknown = {k for k, v in options.items() if k not in KNOWN_OPTIONS and v is not None and v is not False}
        self.problems |= {f"its attention uses {name}" for name in unknown - {"scaling", "forward_batch"}}
        if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            self.problems.add("its attention is not causal")
        if key.shape[2] != query.shape[2]:
            self.problems.add("it attends to more than the tokens of the sequence")
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        self.windows[module.layer_idx] = window = options.get("sliding_window") or 0
        self._check_mask(mask, window)
        groups = query.shape[1] // key.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous()

    def make_mask(self, rule: MaskRule, device: torch.device) -> torch.Tensor:
        """Stands for a mask in the model's forward, and leads from the attention call back to its rule."""
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
        self._masks.append(mask)
        self._rules[mask.data_ptr()] = rule
        return mask

    def _check_mask(self, mask: torch.Tensor | None, window: int) -> None:
        """The mask must say what the options say: attend to the last `window` tokens, or to all if it is 0."""
        if mask is None:
            if window:
                self.problems.add("its attention is given a sliding window but no mask")
            return
        rule = self._rules.get(mask.data_ptr())
        if rule is None:
            self.problems.add("it makes its attention mask in its own way")
            return
        query = self._far + 4 * window
        visible = [query, query - 1, query - window + 1] if window > 1 else [query] if window else [query, query - 1, 0]
        hidden = [query + 1, query - window, 0] if window else [query + 1]
        if not _sees(rule, query, visible, True) or not _sees(rule, query, hidden, False):
            self.problems.add(
                "its mask is not the one that its attention is told of (a sliding window or other rule that only the mask knows)"
            )

    def _check_cache(self, model: PreTrainedModel) -> None:
        """HF's cache must not forget tokens that the attention may see: it would then be the cache that makes the window."""
        for index, layer in enumerate(DynamicCache(config=model.config).layers):
            kept, window = getattr(layer, "sliding_window", None), self.windows.get(index, 0)
            if kept is not None and kept <= self._far and not 0 < window <= kept:
                self.problems.add("its cache forgets tokens that its attention may see")


def _sees(rule: MaskRule, query: int, keys: list[int], expected: bool) -> bool:
    try:
        zero = torch.tensor(0)
        return all(bool(rule(zero, zero, torch.tensor(query), torch.tensor(key))) is expected for key in keys)
    except Exception:  # a rule over tensors of this very batch: nothing that holds at every length
        return False


def _registered() -> str:
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    return _NAME


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return _current.get().attend(module, query, key, value, attention_mask, kwargs), None


def _mask(*args: Any, mask_function: MaskRule, device: Any = None, **kwargs: Any) -> torch.Tensor:
    return _current.get().make_mask(mask_function, device)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No hook of the user fires, no dropout draws random numbers, nothing is compiled."""
    saved = []
    training = [module for module in model.modules() if module.training]
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                saved.append((hooks, dict(hooks)))
                hooks.clear()
    try:
        for module in training:
            module.training = False
        with torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
        for hooks, content in saved:
            hooks.update(content)


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where the forward takes its inputs, also while accelerate keeps the weights elsewhere."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "meta"))
