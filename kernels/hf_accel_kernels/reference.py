"""Every op in plain PyTorch: the oracle the fast forms are tested against.

Owns what the ops mean. Slow, written to be obviously right, on any device. Knows nothing about speed.
"""

from __future__ import annotations

import torch


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into their slots; see `ops.store_kv`."""
    page_size = k_pages.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        for x, pages, scales in ((k[token], k_pages, k_scales), (v[token], v_pages, v_scales)):
            for head, values in enumerate(x):  # [dim]
                if scales is not None:
                    values = values.float()
                    scale = values.abs().max() / 448
                    scale = scale if scale != 0 else torch.ones_like(scale)
                    scales[slot // page_size, head, slot % page_size] = scale
                    values = (values / scale).to(pages.dtype)
                pages[slot // page_size, head, slot % page_size] = values


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """One query token at a time, in `compute_dtype`; see `ops.paged_attention`."""
    page_size, group = k_pages.shape[2], q.shape[1] // k_pages.shape[1]
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])
    out.zero_()
    if out_lse is not None:
        out_lse.copy_(-torch.inf if sinks is None else sinks.float())
    starts = query_start_loc.tolist()
    for seq, seq_len in enumerate(seq_lens.tolist()):
        query_len = starts[seq + 1] - starts[seq]
        for j in range(query_len):
            position = seq_len - query_len + j
            first = max(0, position - sliding_window + 1) if sliding_window else 0
            visible = torch.arange(first, max(first, position + 1), device=q.device)
            if visible.numel() == 0:
                continue
            pages = page_table[seq, visible // page_size].long()
            keys = _held(k_pages, k_scales, pages, visible % page_size, compute_dtype).repeat_interleave(group, dim=1)
            values = _held(v_pages, v_scales, pages, visible % page_size, compute_dtype).repeat_interleave(group, dim=1)
            query = q[starts[seq] + j].to(compute_dtype)  # [num_heads, head_dim]
            logits = torch.einsum("nhd,hd->hn", keys, query) * scale  # [num_heads, num_visible]
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks.to(compute_dtype)[:, None]], dim=1)
            if out_lse is not None:
                out_lse[starts[seq] + j] = logits.logsumexp(1).float()
            weights = torch.softmax(logits, dim=1)[:, : visible.numel()]
            out[starts[seq] + j] = torch.einsum("hn,nhd->hd", weights, values).to(out.dtype)
    return out


def _held(
    pages: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of pages [num_rows, num_kv_heads, dim] as `dtype`; fp8 ones times their scales."""
    if scales is None:
        return pages[ids, :, offsets].to(dtype)
    return pages.to(dtype)[ids, :, offsets] * scales[ids, :, offsets].to(dtype)[:, :, None]


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over both sides' sums, in float64; see `merge_state.merge_state`."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    out = torch.zeros(out_a.shape, dtype=torch.float64, device=out_a.device)
    for side, side_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(side_lse == -torch.inf, 0.0, torch.exp(side_lse.double() - lse))
        out += side.double() * weight[:, :, None]
    return out.to(out_a.dtype), lse.float()


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, mask_rows: torch.Tensor | None = None) -> None:
    """One token at a time; see `token_bitmask.apply_token_bitmask`."""
    masks = bitmask.tolist()
    rows = list(range(logits.shape[0])) if mask_rows is None else mask_rows.tolist()
    for row, mask_row in enumerate(rows):
        if mask_row < 0:
            continue
        for token in range(logits.shape[1]):
            word = token // 32
            if word >= len(masks[mask_row]) or not masks[mask_row][word] >> token % 32 & 1:
                logits[row, token] = -torch.inf
