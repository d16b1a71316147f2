"""Multi-head latent attention in plain PyTorch ops, for any device: the form of `mla.py` without a kernel.

Owns the fp8 rows' conversion in torch ops. Attention goes through `torch_attention`: a page of latents is a page of one
kv head whose values are its keys. Validates nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import torch_attention

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def mla_store(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """`mla.mla_store`. On CUDA no slot may be negative (skipping one would need a host sync)."""
    if slot_mapping.device.type == "cpu" and slot_mapping.numel() and int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        latent, rope_key, slot_mapping = latent[kept], rope_key[kept], slot_mapping[kept]
    where = (slot_mapping // pages.shape[1], slot_mapping % pages.shape[1])
    if scales is None:
        pages[where] = torch.cat([latent, rope_key], dim=1)
        return
    (latent, latent_scale), (rope_key, rope_scale) = quantize_rows(latent), quantize_rows(rope_key)
    pages.view(torch.uint8)[where] = torch.cat([latent.view(torch.uint8), rope_key.view(torch.uint8)], dim=1)
    scales[where] = torch.cat([latent_scale, rope_scale], dim=1)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_rows, width] -> the same in fp8 and [num_rows, 1] float32 scales."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / FP8_MAX if x.shape[1] else x.new_zeros(x.shape[0], 1)
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).to(FP8), scale


def gather_rows(
    pages: torch.Tensor, page_ids: torch.Tensor, rank: int, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Whole pages in order, [num_pages, page_size, rank + rope] of `dtype`."""
    page_ids = page_ids.long()
    if scales is None:
        return pages.index_select(0, page_ids)
    rows = pages.view(torch.uint8).index_select(0, page_ids).view(FP8).float()
    factors = scales.index_select(0, page_ids)
    rows[..., :rank] *= factors[..., :1]
    rows[..., rank:] *= factors[..., 1:]
    return rows.to(dtype)


def mla_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    rank: int,
    scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`mla.mla_attention` into `out`; waits for the host copy of the lengths."""
    query_lens, lens = query_start_loc.diff().tolist(), seq_lens.tolist()
    if scales is not None:
        page_size = pages.shape[1]
        counts = [-(-n // page_size) for n in lens]
        used = torch.cat([page_table[i, :n] for i, n in enumerate(counts)])
        pages = gather_rows(pages, used, rank, scales, q.dtype)
        table = torch.zeros_like(page_table)
        first = 0
        for i, n in enumerate(counts):
            table[i, :n] = torch.arange(first, first + n, dtype=torch.int32, device=table.device)
            first += n
        page_table = table
    rows = pages.unsqueeze(1)  # one kv head
    result = torch_attention.paged_attention(q, rows, rows, page_table, seq_lens, query_lens, lens, scale)
    out.copy_(result[..., :rank])


def absorb(q: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """q [num_tokens, num_heads, nope + rope] and Wuk [num_heads, nope, rank] -> [num_tokens, num_heads, rank + rope]."""
    num_heads, nope, rank = w_uk.shape
    absorbed = q.new_empty(q.shape[0], num_heads, rank + q.shape[2] - nope)
    torch.bmm(q[..., :nope].transpose(0, 1), w_uk, out=absorbed[..., :rank].transpose(0, 1))
    absorbed[..., rank:] = q[..., nope:]
    return absorbed


def expand(o_lat: torch.Tensor, w_uv: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """o_lat [num_tokens, num_heads, rank] and Wuv [num_heads, v, rank] -> [num_tokens, num_heads, v], written to `out`."""
    if out is None:
        out = o_lat.new_empty(*o_lat.shape[:2], w_uv.shape[1])
    torch.bmm(o_lat.transpose(0, 1), w_uv.transpose(1, 2), out=out.transpose(0, 1))
    return out


def expanded_attention(
    q: torch.Tensor, kv: torch.Tensor, rope_key: torch.Tensor, scale: float, nope: int
) -> torch.Tensor:
    """`mla.mla_expanded_attention`: shapes as there."""
    (num_tokens, num_heads, _), length = q.shape, kv.shape[0]
    k_nope, values = kv.view(length, num_heads, -1).transpose(0, 1).tensor_split([nope], dim=2)
    keys = torch.cat([k_nope, rope_key.expand(num_heads, -1, -1)], dim=2)  # [num_heads, length, nope + rope]
    seen = torch.ones(num_tokens, length, dtype=torch.bool, device=q.device).tril(length - num_tokens)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys[None], values[None], attn_mask=seen, scale=scale)
    return out[0].transpose(0, 1)
