"""Paged attention and the store of keys and values in plain PyTorch ops, for any device: the form without a kernel.

Owns the gather of pages into dense keys and values and the calls of `scaled_dot_product_attention`. The query heads of a
kv head are folded into the query axis, never `enable_gqa`: each key is then read once for its group (on CPU 7x faster).
Slots beyond a sequence's length are never gathered, so whatever an unwritten slot holds (NaN too) cannot reach a result.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
QUERY_CHUNK = 256  # query tokens per call in prefill: bounds the mask, and skips the keys above the diagonal


class _Buffers(threading.local):
    """Gather targets kept between calls on CPU, where a fresh 100 MB tensor costs more in page faults than its copy."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, num_rows: int) -> torch.Tensor:
        width = like.shape[-1]
        buffer = self.kept.get((name, like.dtype))
        if buffer is None or buffer.numel() < num_rows * width:
            buffer = self.kept[name, like.dtype] = like.new_empty(num_rows * width * 5 // 4)
        return buffer[: num_rows * width].view(num_rows, width)


_buffers = _Buffers()


@dataclass(frozen=True)
class Options:
    """`ops.paged_attention`'s options."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    """`ops.store_kv` in torch ops. On CUDA no slot may be negative (skipping one would need a host sync)."""
    if slot_mapping.device.type == "cpu" and slot_mapping.numel() and int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    page_size = k_pages.shape[2]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    for x, target, scales in ((k, k_pages, k_scales), (v, v_pages, v_scales)):
        if scales is not None:
            x, scales[pages, :, offsets] = _quantize(x)
            target = target.view(torch.uint8)  # fp8 has no index ops
        target[pages, :, offsets] = x


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_tokens, num_heads, dim] -> bytes of the same in fp8, and [num_tokens, num_heads] float32 scales."""
    x = x.float()
    scales = x.abs().amax(dim=2) / 448.0
    scales = torch.where(scales == 0, 1.0, scales)
    return (x / scales[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scales


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens_cpu: Sequence[int],
    seq_lens_cpu: Sequence[int],
    scale: float,
    *,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.paged_attention` in torch ops; the lengths come as host ints too, so that CUDA never waits for the host.

    Decode rows on CUDA go as one padded batch; everything else goes request by request.
    """
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])
    decode = [i for i, n in enumerate(query_lens_cpu) if n == 1 and seq_lens_cpu[i] > 0] if q.is_cuda else []
    options = Options(scale, sliding_window, softcap, sinks, k_scales, v_scales)
    pages = (k_pages, v_pages)
    if decode:
        starts = [0]
        for n in query_lens_cpu:
            starts.append(starts[-1] + n)
        _attend_decode_batch(q, *pages, page_table, seq_lens, decode, starts, seq_lens_cpu, options, out, out_lse)
    batched = set(decode)
    start = 0
    for i, (query_len, seq_len) in enumerate(zip(query_lens_cpu, seq_lens_cpu)):
        if query_len and i not in batched:
            rows = slice(start, start + query_len)
            lse = None if out_lse is None else out_lse[rows]
            _attend_request(q[rows], *pages, page_table[i], seq_len, options, out[rows], lse)
        start += query_len
    return out


def _attend_request(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    seq_len: int,
    options: Options,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
) -> None:
    """One sequence's queries, in chunks, each against the keys that some query of the chunk sees."""
    query_len, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    group, window = num_heads // num_kv_heads, options.window
    offset = seq_len - query_len  # position of the first query
    if offset < 0:
        out[:-offset] = 0
        if out_lse is not None:
            out_lse[:-offset] = -torch.inf if options.sinks is None else options.sinks.float()
    if seq_len <= 0:
        return
    first_page = max(0, offset - window + 1) // page_size if window else 0
    page_ids = pages[first_page : -(-seq_len // page_size)]
    keys = _gather("k", k_pages, options.k_scales, page_ids, q.dtype)
    values = _gather("v", v_pages, options.v_scales, page_ids, q.dtype)
    base = first_page * page_size
    for start in range(max(0, -offset), query_len, QUERY_CHUNK):
        stop = min(query_len, start + QUERY_CHUNK)
        low = max(0, offset + start - window + 1) if window else 0
        visible = slice(low - base, offset + stop - base)
        rows = q[start:stop].view(stop - start, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        mask = _mask(offset + start, offset + stop, low, window, q.device)
        result, lse = _attend(
            rows.reshape(1, num_kv_heads, -1, head_dim),
            keys[None, :, visible],
            values[None, :, visible],
            None if mask is None else mask.repeat(group, 1),
            options,
            out_lse is not None,
        )
        result = result.view(num_kv_heads, group, stop - start, -1).permute(2, 0, 1, 3)
        out[start:stop] = result.reshape(stop - start, num_heads, -1)
        if out_lse is not None:
            out_lse[start:stop] = lse.view(num_heads, stop - start).T


def _mask(first: int, last: int, low: int, window: int, device: torch.device) -> torch.Tensor | None:
    """[last - first, last - low] bool: which keys at positions low.. the queries at positions first.. see; None: all."""
    if last - first == 1:
        return None
    query = torch.arange(first, last, device=device)[:, None]
    key = torch.arange(low, last, device=device)[None]
    mask = key <= query
    return mask & (key > query - window) if window else mask


def _gather(
    name: str, pages: torch.Tensor, scales: torch.Tensor | None, page_ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Pages in order -> dense rows [num_kv_heads, num_pages * page_size, dim] of `dtype`, one copy."""
    num_kv_heads = pages.shape[1]
    heads = torch.arange(num_kv_heads, device=page_ids.device)[:, None]
    index = (page_ids.long()[None] * num_kv_heads + heads).reshape(-1)
    source = pages if scales is None else pages.view(torch.uint8)  # fp8 has no index ops
    rows = source.view(pages.shape[0] * num_kv_heads, -1)  # a page of one head is contiguous
    if pages.device.type == "cpu":
        dense = torch.index_select(rows, 0, index, out=_buffers.take(name, rows, index.numel()))
    else:
        dense = rows.index_select(0, index)
    dense = dense.view(num_kv_heads, -1, pages.shape[3])
    if scales is None:
        return dense
    factors = scales.view(rows.shape[0], -1).index_select(0, index).view(num_kv_heads, -1, 1)
    return (dense.view(FP8).float() * factors).to(dtype)


def _attend_decode_batch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    decode: list[int],
    starts: list[int],
    seq_lens_cpu: Sequence[int],
    options: Options,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
) -> None:
    """All sequences with one query token, keys padded to the longest by repeating a written slot, and masked."""
    num_kv_heads, page_size = k_pages.shape[1:3]
    window = options.window
    everything = len(decode) == len(seq_lens_cpu)
    seqs = slice(None) if everything else torch.tensor(decode, device=q.device)
    tokens = slice(None) if everything else torch.tensor([starts[i] for i in decode], device=q.device)
    lens = seq_lens[seqs].long()[:, None]  # [num_decode, 1]
    longest = max(seq_lens_cpu[i] for i in decode)
    if window and window < longest:
        positions = lens - window + torch.arange(window, device=q.device)
    else:
        positions = torch.arange(longest, device=q.device).expand(len(decode), -1)
    mask = (positions >= 0) & (positions < lens)  # [num_decode, num_keys]
    positions = torch.where(mask, positions, lens - 1)
    pages = page_table[seqs].gather(1, positions // page_size).long()
    heads = torch.arange(num_kv_heads, device=q.device)[None, :, None]
    index = ((pages[:, None] * num_kv_heads + heads) * page_size + (positions % page_size)[:, None]).reshape(-1)
    shape = (len(decode), num_kv_heads, positions.shape[1], -1)
    keys, values = (
        _take_rows(pages, scales, index, q.dtype).view(shape)
        for pages, scales in ((k_pages, options.k_scales), (v_pages, options.v_scales))
    )
    rows = q[tokens].reshape(len(decode), num_kv_heads, -1, q.shape[2])  # the group as the query axis
    result, lse = _attend(rows, keys, values, mask[:, None, None], options, out_lse is not None)
    out[tokens] = result.reshape(len(decode), q.shape[1], -1)
    if out_lse is not None:
        out_lse[tokens] = lse.reshape(len(decode), -1)


def _take_rows(
    pages: torch.Tensor, scales: torch.Tensor | None, index: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Tokens' rows by flat index -> [num_rows, dim] of `dtype`."""
    if scales is None:
        return pages.view(-1, pages.shape[3]).index_select(0, index)
    rows = pages.view(torch.uint8).view(-1, pages.shape[3]).index_select(0, index).view(FP8)
    return (rows.float() * scales.view(-1)[index][:, None]).to(dtype)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    options: Options,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [batch, num_kv_heads, rows, head_dim], rows = group-major query heads; mask broadcastable to the logits.

    The second result is each row's log of the sum of exponentials [batch, num_kv_heads, rows], if wanted.
    """
    softcap, sinks = options.softcap, options.sinks
    if not softcap and sinks is None and not want_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale), None
    logits = (q.float() @ k.float().transpose(-1, -2)) * options.scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    num_keys = logits.shape[-1]
    if sinks is not None:
        num_kv_heads, num_rows = q.shape[1:3]
        group = sinks.numel() // num_kv_heads
        extra = (
            sinks.float()
            .view(num_kv_heads, group, 1)
            .expand(-1, -1, num_rows // group)
            .reshape(1, num_kv_heads, num_rows, 1)
        )
        logits = torch.cat([logits, extra.expand(q.shape[0], -1, -1, -1)], dim=-1)
    lse = logits.logsumexp(-1) if want_lse else None
    weights = torch.softmax(logits, dim=-1)[..., :num_keys]
    return (weights @ v.float()).to(q.dtype), lse
