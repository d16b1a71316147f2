"""Multi-head latent attention in plain PyTorch float64, one query at a time: the oracle of `mla.py`.

Owns what the ops mean, and what a row of fp8 pages holds. Slow, written to be obviously right. Knows nothing about speed.
"""

from __future__ import annotations

import torch

FP8_MAX = 448.0


def mla_store(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """One token at a time; see `mla.mla_store`."""
    page_size, rank = pages.shape[1], latent.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        page, offset = slot // page_size, slot % page_size
        if scales is None:
            pages[page, offset, :rank] = latent[token]
            pages[page, offset, rank:] = rope_key[token]
            continue
        for part, (values, columns) in enumerate(((latent, slice(0, rank)), (rope_key, slice(rank, None)))):
            row = values[token].float()
            scale = torch.cat([row.abs(), torch.zeros(1)]).max() / FP8_MAX
            scale = torch.ones_like(scale) if scale == 0 else scale
            scales[page, offset, part] = scale
            pages[page, offset, columns] = (row / scale).to(pages.dtype)


def row_of(
    pages: torch.Tensor, scales: torch.Tensor | None, page: int, offset: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent [rank] and the rotary key [rope] of one slot, float64."""
    row = pages[page, offset].double()
    if scales is None:
        return row[:rank], row[rank:]
    return row[:rank] * scales[page, offset, 0].double(), row[rank:] * scales[page, offset, 1].double()


def mla_gather(
    pages: torch.Tensor, page_ids: torch.Tensor, length: int, rank: int, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [length, rank] and rotary keys [length, rope] of a sequence, float64."""
    page_size = pages.shape[1]
    rows = [row_of(pages, scales, int(page_ids[i // page_size]), i % page_size, rank) for i in range(length)]
    width = pages.shape[2]
    if not rows:
        empty = torch.zeros(0, width, dtype=torch.float64)
        return empty[:, :rank], empty[:, rank:]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def mla_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    rank: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[num_tokens, num_heads, rank] float64; see `mla.mla_attention`."""
    out = torch.zeros(q.shape[0], q.shape[1], rank, dtype=torch.float64)
    starts = query_start_loc.tolist()
    for seq, seq_len in enumerate(seq_lens.tolist()):
        query_len = starts[seq + 1] - starts[seq]
        if not query_len or not seq_len:
            continue
        latents, rope_keys = mla_gather(pages, page_table[seq], seq_len, rank, scales)
        for j in range(query_len):
            num_visible = seq_len - query_len + j + 1
            if num_visible <= 0:
                continue
            query = q[starts[seq] + j].double()  # [num_heads, rank + rope]
            logits = query[:, :rank] @ latents[:num_visible].T + query[:, rank:] @ rope_keys[:num_visible].T
            out[starts[seq] + j] = torch.softmax(logits * scale, dim=1) @ latents[:num_visible]
    return out


def split_weight(weight: torch.Tensor, num_heads: int, nope: int) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_b_proj's weight as float64 (Wuk [num_heads, nope, rank], Wuv [num_heads, v, rank])."""
    per_head = weight.double().reshape(num_heads, -1, weight.shape[1])
    return per_head[:, :nope], per_head[:, nope:]


def mla_absorbed_attention(
    q: torch.Tensor,
    weight: torch.Tensor,
    nope: int,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[num_tokens, num_heads, v] float64; see `mla.mla_absorbed_attention`."""
    rank = weight.shape[1]
    w_uk, w_uv = split_weight(weight, q.shape[1], nope)
    absorbed = torch.einsum("thn,hnr->thr", q[..., :nope].double(), w_uk)
    query = torch.cat([absorbed, q[..., nope:].double()], dim=2)
    tables = (page_table, seq_lens, query_start_loc)
    o_lat = mla_attention(query, pages, *tables, scale, rank=rank, scales=scales)
    return torch.einsum("thr,hvr->thv", o_lat, w_uv)


def expanded_attention(
    q: torch.Tensor,
    latents: torch.Tensor,
    rope_keys: torch.Tensor,
    weight: torch.Tensor,
    nope: int,
    scale: float,
    *,
    kv_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The definition: expand latents [length, rank] to every head's keys and values, then causal attention of the last
    tokens' queries q [num_tokens, num_heads, nope + rope]. float64 but for the expanded keys and values, which are
    rounded to `kv_dtype` as a model of that dtype does.
    """
    num_tokens, num_heads = q.shape[:2]
    length = latents.shape[0]
    w_uk, w_uv = split_weight(weight, num_heads, nope)
    keys = torch.einsum("lr,hnr->hln", latents.double(), w_uk).to(kv_dtype).double()
    values = torch.einsum("lr,hvr->hlv", latents.double(), w_uv).to(kv_dtype).double()
    out = torch.zeros(num_tokens, num_heads, w_uv.shape[1], dtype=torch.float64)
    for j in range(num_tokens):
        visible = slice(0, length - num_tokens + j + 1)
        for h in range(num_heads):
            query = q[j, h].double()
            logits = keys[h, visible] @ query[:nope] + rope_keys[visible].double() @ query[nope:]
            out[j, h] = torch.softmax(logits * scale, dim=0) @ values[h, visible]
    return out
