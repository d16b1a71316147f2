"""Leaves in HF's cache object what HF's own loop would have left there, read from the page pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_accel.engine.engine import Engine
from hf_accel.request import Request


def export_kv(
    engine: Engine,
    model: PreTrainedModel,
    rows: Sequence[Request],
    sequences: torch.Tensor,
    mask: torch.Tensor | None,
    cache: DynamicCache,
) -> None:
    """Fill `cache` with the KV of all tokens of `sequences` but the last.

    Args:
        engine: whose pool holds the rows.
        model: computes the KV anew if a row lost its pages meanwhile.
        rows: one for each sequence, not closed yet.
        sequences: [batch, length] left-padded prompt and generated ids.
        mask: [batch, prompt length] attention mask of the call, or None.
        cache: empty. Positions of padding, and after a row's end, hold zeros.
    """
    length = sequences.shape[1] - 1
    with engine.core.exclusive():
        resident = all(row.slot is not None for row in rows)
        if resident:
            _copy(engine, rows, sequences, length, cache)
    if not resident:
        prompt_length = sequences.shape[1] if mask is None else mask.shape[1]
        full = torch.ones_like(sequences[:, :-1])
        if mask is not None:
            full[:, :prompt_length] = mask[:, :length]
        model(
            input_ids=sequences[:, :-1].to(model.device),
            attention_mask=full,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


def _copy(engine: Engine, rows: Sequence[Request], sequences: torch.Tensor, length: int, cache: DynamicCache) -> None:
    runner, builder = engine.core.executor.runner, engine.core.executor.builder
    num_generated = [row.num_computed_tokens - row.num_prompt_tokens for row in rows]
    prompt_length = length - max(num_generated)  # the longest row computed all tokens but the last
    for layer, shape in enumerate(runner.spec.layers):
        keys = torch.zeros(
            len(rows), shape.num_kv_heads, length, shape.head_dim, dtype=runner.dtype, device=runner.device
        )
        values = keys.new_zeros(*keys.shape[:3], shape.v_head_dim)
        for i, row in enumerate(rows):
            computed = row.num_computed_tokens
            pages = builder.page_ids(row.slot or 0, computed)
            start = prompt_length - row.num_prompt_tokens
            keys[i, :, start : start + computed], values[i, :, start : start + computed] = runner.read_kv(
                layer, pages, computed
            )
        cache.update(keys, values, layer)
