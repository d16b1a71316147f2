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

    Layers, shapes, dtypes and lengths are those of HF's cache, and so is every token's KV. Masked positions hold zeros,
    where HF's masked forward leaves KV of its own: under the call's mask, which whoever goes on from HF's cache must
    give too, no token ever sees them.

    Args:
        engine: whose pool holds the rows.
        model: computes the KV anew if a row lost its pages meanwhile.
        rows: one for each sequence, not closed yet.
        sequences: [batch, length] prompt and generated ids.
        mask: [batch, prompt length] attention mask of the call, or None.
        cache: empty.
    """
    seen = torch.ones(sequences.shape[0], sequences.shape[1] - 1, dtype=torch.long)
    if mask is not None:
        seen[:, : mask.shape[1]] = mask.cpu()[:, : seen.shape[1]]
    with engine.core.exclusive():
        resident = all(row.slot is not None for row in rows)
        if resident:
            _copy(engine, rows, seen, cache)
    if not resident:
        model(
            input_ids=sequences[:, :-1].to(model.device),
            attention_mask=seen.to(model.device),
            position_ids=(seen.cumsum(dim=-1) - 1).clamp(min=0).to(model.device),  # as HF's `generate` counts them
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


def _copy(engine: Engine, rows: Sequence[Request], seen: torch.Tensor, cache: DynamicCache) -> None:
    """`seen`: [batch, length] on the host, 1 where a row has its next token; each has computed as many."""
    runner, cache_manager, page_size = engine.core.executor.runner, engine.core.cache, engine.config.page_size
    columns = [row.nonzero()[:, 0].to(runner.device) for row in seen]
    for layer, shape in enumerate(runner.spec.layers):
        keys = torch.zeros(
            len(rows), shape.num_kv_heads, seen.shape[1], shape.head_dim, dtype=runner.dtype, device=runner.device
        )
        values = keys.new_zeros(*keys.shape[:3], shape.v_head_dim)
        for i, row in enumerate(rows):
            computed = row.num_computed_tokens
            page_ids = cache_manager.page_ids(row.request_id)[: -(-computed // page_size)]
            pages = torch.tensor(page_ids, device=runner.device)
            keys[i][:, columns[i]], values[i][:, columns[i]] = runner.read_kv(layer, pages, computed)
        cache.update(keys, values, layer)
        kept = cache.layers[layer]
        if kept.keys.shape[2] < keys.shape[2]:  # a window: a view of it would keep, and save, all tokens
            kept.keys, kept.values = kept.keys.clone(), kept.values.clone()
