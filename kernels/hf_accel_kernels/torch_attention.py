"""Paged attention and the store of keys and values in plain PyTorch ops, for any device: the form without a kernel.

Owns the gather of pages into dense keys and values and the calls of `scaled_dot_product_attention`. The query heads of a
kv head are folded into the query axis, never `enable_gqa`: each key is then read once for its group (on CPU 7x faster).
Slots beyond a sequence's length are never gathered, so whatever an unwritten slot holds (NaN too) cannot reach a result.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F

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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.paged_attention` in torch ops; the lengths come as host ints too, so that CUDA never waits for the host.

    Decode rows on CUDA go as one padded batch; everything else goes request by request.
    """
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])
    decode = [i for i, n in enumerate(query_lens_cpu) if n == 1 and seq_lens_cpu[i] > 0] if q.is_cuda else []
    extras = (scale, softcap, sinks)
    if decode:
        starts = [0]
        for n in query_lens_cpu:
            starts.append(starts[-1] + n)
        _attend_decode_batch(
            q, k_pages, v_pages, page_table, seq_lens, decode, starts, seq_lens_cpu, sliding_window, extras, out
        )
    batched = set(decode)
    start = 0
    for i, (query_len, seq_len) in enumerate(zip(query_lens_cpu, seq_lens_cpu)):
        if query_len and i not in batched:
            rows = slice(start, start + query_len)
            _attend_request(q[rows], k_pages, v_pages, page_table[i], seq_len, sliding_window, extras, out[rows])
        start += query_len
    return out


def _attend_request(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    seq_len: int,
    window: int,
    extras: tuple[float, float, torch.Tensor | None],
    out: torch.Tensor,
) -> None:
    """One sequence's queries, in chunks, each against the keys that some query of the chunk sees."""
    query_len, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    group = num_heads // num_kv_heads
    offset = seq_len - query_len  # position of the first query
    if offset < 0:
        out[:-offset] = 0
    if seq_len <= 0:
        return
    first_page = max(0, offset - window + 1) // page_size if window else 0
    keys, values = _gather(k_pages, v_pages, pages[first_page : -(-seq_len // page_size)])
    base = first_page * page_size
    for start in range(max(0, -offset), query_len, QUERY_CHUNK):
        stop = min(query_len, start + QUERY_CHUNK)
        low = max(0, offset + start - window + 1) if window else 0
        visible = slice(low - base, offset + stop - base)
        rows = q[start:stop].view(stop - start, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        mask = _mask(offset + start, offset + stop, low, window, q.device)
        result = _attend(
            rows.reshape(1, num_kv_heads, -1, head_dim),
            keys[None, :, visible],
            values[None, :, visible],
            None if mask is None else mask.repeat(group, 1),
            extras,
        )
        result = result.view(num_kv_heads, group, stop - start, -1).permute(2, 0, 1, 3)
        out[start:stop] = result.reshape(stop - start, num_heads, -1)


def _mask(first: int, last: int, low: int, window: int, device: torch.device) -> torch.Tensor | None:
    """[last - first, last - low] bool: which keys at positions low.. the queries at positions first.. see; None: all."""
    if last - first == 1:
        return None
    query = torch.arange(first, last, device=device)[:, None]
    key = torch.arange(low, last, device=device)[None]
    mask = key <= query
    return mask & (key > query - window) if window else mask


def _gather(k_pages: torch.Tensor, v_pages: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages in order -> keys and values [num_kv_heads, num_pages * page_size, dim], one copy each."""
    num_kv_heads = k_pages.shape[1]
    heads = torch.arange(num_kv_heads, device=pages.device)[:, None]
    index = (pages.long()[None] * num_kv_heads + heads).reshape(-1)
    dense = []
    for name, source in (("k", k_pages), ("v", v_pages)):
        rows = source.view(source.shape[0] * num_kv_heads, -1)  # a page of one head is contiguous
        if source.device.type == "cpu":
            gathered = torch.index_select(rows, 0, index, out=_buffers.take(name, rows, index.numel()))
        else:
            gathered = rows.index_select(0, index)
        dense.append(gathered.view(num_kv_heads, -1, source.shape[3]))
    return dense[0], dense[1]


def _attend_decode_batch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    decode: list[int],
    starts: list[int],
    seq_lens_cpu: Sequence[int],
    window: int,
    extras: tuple[float, float, torch.Tensor | None],
    out: torch.Tensor,
) -> None:
    """All sequences with one query token, keys padded to the longest by repeating a written slot, and masked."""
    num_kv_heads, page_size = k_pages.shape[1:3]
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
    keys = k_pages.view(-1, k_pages.shape[3]).index_select(0, index).view(shape)
    values = v_pages.view(-1, v_pages.shape[3]).index_select(0, index).view(shape)
    rows = q[tokens].reshape(len(decode), num_kv_heads, -1, q.shape[2])  # the group as the query axis
    result = _attend(rows, keys, values, mask[:, None, None], extras)
    out[tokens] = result.reshape(len(decode), q.shape[1], -1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    extras: tuple[float, float, torch.Tensor | None],
) -> torch.Tensor:
    """q [batch, num_kv_heads, rows, head_dim], rows = group-major query heads; mask broadcastable to the logits."""
    scale, softcap, sinks = extras
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = (q.float() @ k.float().transpose(-1, -2)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return (torch.softmax(logits, dim=-1) @ v.float()).to(q.dtype)
    num_kv_heads, num_rows = q.shape[1:3]
    group = sinks.numel() // num_kv_heads
    extra = (
        sinks.float()
        .view(num_kv_heads, group, 1)
        .expand(-1, -1, num_rows // group)
        .reshape(1, num_kv_heads, num_rows, 1)
    )
    logits = torch.cat([logits, extra.expand(q.shape[0], -1, -1, -1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :-1]
    return (weights @ v.float()).to(q.dtype)
