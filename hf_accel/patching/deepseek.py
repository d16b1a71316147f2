"""Multi-head latent attention (DeepSeek-V2/V3 and models of their layout): how its modules reach the engine as latents.

Owns the table of admitted families, the absorbed weights and, while a step runs, the instance-level `expand_kv` of the
attention modules, which then hands this step's latents through instead of expanding them. Does not know when weights change
(the engine calls `refresh`), nor batches.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hf_accel.attention.latent import LatentLayer
from hf_accel.kv_cache.mla_pool import MLAPool
from hf_accel.patching.llama_structure import is_user_hook
from hf_accel.patching.stepping import in_step, step
from hf_accel_kernels.mla import AbsorbedWeights

logger = logging.getLogger("hf_accel")

MODEL_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "axk1", "glm4_moe_lite", "minicpm3", "youtu"})
"""Families whose attention was read against DeepSeek's: latents cached, `expand_kv`, then the attention interface with
nothing between. Others of the layout add sparse indexers, output gates or recurrent layers."""

LINEAR_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative difference that rounding may make between `kv_b_proj` and the matrix read off it."""


def why_not_latent(model: nn.Module) -> str:
    """ "" when a model with `kv_lora_rank` keeps latents as DeepSeek does, else the reason in words."""
    config: Any = model.config
    if config.model_type not in MODEL_TYPES:
        return (
            f"its variant of multi-head latent attention ({config.model_type}) is not supported; supported are "
            f"{', '.join(sorted(MODEL_TYPES))}"
        )
    if len(latent_modules(model)) != config.num_hidden_layers:
        return "its layers do not all use multi-head latent attention"
    return ""


def latent_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that keep latents, by layer."""
    names = ("expand_kv", "kv_b_proj", "qk_nope_head_dim", "v_head_dim", "layer_idx")
    return [m for m in model.modules() if all(hasattr(m, name) for name in names)]


class LatentLayers:
    """The absorbed weights of one model's layers, beside its `kv_b_proj`s.

    Args:
        model: whose; held weakly, and never changed outside a step.
        packed: keep copies laid out for streaming; else the products read the model's own weights, a few % slower.
    """

    def __init__(self, model: nn.Module, *, packed: bool) -> None:
        self._modules = [weakref.ref(m) for m in latent_modules(model)]
        self._packed = packed
        self._weights: dict[int, AbsorbedWeights | None] = {}
        self._watched: list[bool] = []
        self.refresh(changed=True)

    def refresh(self, changed: bool) -> None:
        """Follow a weight change, or hooks that came or went; called between steps."""
        modules = self.modules()
        watched = [_is_watched(m.kv_b_proj) for m in modules]
        if not changed and watched == self._watched:
            return
        self._watched = watched
        for module in modules:
            self._weights[module.layer_idx] = self._absorb(module)
        plain = sum(weights is None for weights in self._weights.values())
        if plain:
            logger.warning(
                "MLA runs expanded, as slow as transformers' own: kv_b_proj of %d layer(s) is no plain product", plain
            )

    def _absorb(self, module: nn.Module) -> AbsorbedWeights | None:
        matrix, held = kv_b_matrix(module), self._weights.get(module.layer_idx)
        if matrix is None:
            return None
        num_heads = matrix.shape[0] // (module.qk_nope_head_dim + module.v_head_dim)
        if held is None or held.dtype != matrix.dtype:
            return AbsorbedWeights(matrix, num_heads, module.qk_nope_head_dim, packed=self._packed)
        held.update(matrix)
        return held

    def modules(self) -> list[Any]:
        """The attention modules, by layer."""
        modules = [ref() for ref in self._modules]
        assert all(m is not None for m in modules), "the model is alive while it runs"
        return modules

    def over(self, pool: MLAPool) -> dict[int, LatentLayer]:
        """Each layer on its pages, by `layer_idx`."""
        return {
            m.layer_idx: LatentLayer(
                pool.pages[m.layer_idx],
                pool.scales[m.layer_idx],
                self._weights[m.layer_idx],
                _expand_by(m.kv_b_proj),
                m.qk_nope_head_dim,
                m.v_head_dim,
            )
            for m in self.modules()
        }

    def addresses(self) -> list[int | None]:
        """Where each layer's absorbed weights are; None for a layer that has none."""
        return [None if w is None else w.weight.data_ptr() for w in self._weights.values()]

    def on(self) -> contextlib.AbstractContextManager[None]:
        """While open, in this thread, the layers pass latents on."""
        return latents_passed_on(self.modules())


def _expand_by(kv_b_proj: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda latents: kv_b_proj(latents[None])[0]


@contextlib.contextmanager
def latents_passed_on(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While open, and in this thread, attention functions get latents where they would get keys and values.

    Key [1, 1, num_tokens, rank] and value [1, 1, num_tokens, rope_dim] of this step's tokens; the query stays
    [1, num_heads, num_tokens, nope_dim + rope_dim].
    """
    taken = []
    for module in modules:
        if "expand_kv" not in module.__dict__:
            module.__dict__["expand_kv"] = function = _make_expand(module)
            taken.append((module, function))
    try:
        with step():
            yield
    finally:
        for module, function in taken:
            if module.__dict__.get("expand_kv") is function:
                del module.__dict__["expand_kv"]


def _make_expand(module: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]] = type(module).expand_kv.__get__(module)

    def expand_kv(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (kv_nope, k_rot) if in_step() else original(kv_nope, k_rot)

    return expand_kv


@torch.no_grad()
def kv_b_matrix(module: nn.Module) -> torch.Tensor | None:
    """What a module's `kv_b_proj` multiplies latents with: [num_heads * (nope_dim + v_dim), rank], or None.

    A plain linear's own weight; for adapters and quantized linears the product's effect on unit vectors. None where it is
    no plain product (a bias, hooks of the user, quantized activations): then latents go through the module itself.
    """
    linear: nn.Module = module.kv_b_proj
    if any(_is_watched(m) for m in linear.modules()) or torch_module._has_any_global_hook():
        return None
    if type(linear) is nn.Linear and "forward" not in linear.__dict__:
        plain = type(linear.weight) is nn.Parameter and linear.weight.is_floating_point() and linear.bias is None
        return linear.weight.detach() if plain else None
    rank, dtype = module.kv_lora_rank, module.kv_a_layernorm.weight.dtype
    device = module.kv_a_layernorm.weight.device
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4, rank, generator=generator).to(device, dtype)
    rows = torch.cat([torch.eye(rank, device=device, dtype=dtype), torch.zeros_like(samples[:1]), samples])
    products = linear(rows[None])[0]
    matrix, zero, expected = products[:rank], products[rank], products[rank + 1 :]
    found = samples.float() @ matrix.float()
    error = (found - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    if bool(zero.any()) or not float(error) <= LINEAR_TOLERANCE.get(dtype, 0.0):
        return None
    return matrix.T.contiguous()


def _is_watched(module: nn.Module) -> bool:
    return any(
        is_user_hook(hook) for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()
    )
