"""Random paged batches for tests and benchmarks of the attention ops.

Owns the making of inputs: shuffled pages, NaN in every slot that no sequence wrote, page table entries of -1 beyond a
sequence's pages, query tensors with gaps between their rows. Knows nothing about the ops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagedCase:
    """One batch; the names and shapes are those of `ops.paged_attention`."""

    q: torch.Tensor  # [num_tokens, num_heads, head_dim], a view into a wider tensor
    k: torch.Tensor  # [num_tokens, num_kv_heads, head_dim], this step's keys, as in the pages
    v: torch.Tensor  # [num_tokens, num_kv_heads, v_head_dim]
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    sinks: torch.Tensor  # [num_heads] float32
    query_lens_cpu: tuple[int, ...]
    seq_lens_cpu: tuple[int, ...]
    k_scales: torch.Tensor | None = None  # of fp8 pages
    v_scales: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[2])

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The positional tensor arguments of `ops.paged_attention`."""
        return self.q, self.k_pages, self.v_pages, self.page_table, self.seq_lens, self.query_start_loc


def make_paged_case(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    v_head_dim: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PagedCase:
    """Sequences of `seq_lens` tokens, the last `query_lens` of which are this step's, already in the pages."""
    v_head_dim = v_head_dim or head_dim
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-length // page_size) for length in seq_lens]
    num_pages = sum(pages_of) + 2
    order = torch.randperm(num_pages, generator=generator).to(torch.int32)
    page_table = torch.full((len(seq_lens), max(pages_of) + 1), -1, dtype=torch.int32)
    k_pages = torch.full((num_pages, num_kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
    v_pages = torch.full((num_pages, num_kv_heads, page_size, v_head_dim), float("nan"), dtype=dtype)
    keys, values, slots = [], [], []
    for i, (query_len, length) in enumerate(zip(query_lens, seq_lens)):
        first = sum(pages_of[:i])
        page_table[i, : pages_of[i]] = order[first : first + pages_of[i]]
        position = torch.arange(length)
        page = page_table[i, position // page_size].long()
        k = torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype)
        v = torch.randn(length, num_kv_heads, v_head_dim, generator=generator).to(dtype)
        k_pages[page, :, position % page_size] = k
        v_pages[page, :, position % page_size] = v
        keys.append(k[length - query_len :])
        values.append(v[length - query_len :])
        slots.append((page * page_size + position % page_size)[length - query_len :])
    num_heads, num_tokens = num_kv_heads * group, sum(query_lens)
    wide = torch.randn(num_tokens, num_heads + 1, head_dim + 3, generator=generator) * 2
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return PagedCase(
        q=wide.to(dtype=dtype, device=device)[:, :num_heads, :head_dim],
        k=torch.cat(keys).to(device),
        v=torch.cat(values).to(device),
        k_pages=k_pages.to(device),
        v_pages=v_pages.to(device),
        page_table=page_table.to(device),
        seq_lens=torch.tensor(list(seq_lens), dtype=torch.int32, device=device),
        query_start_loc=starts.to(device),
        slot_mapping=torch.cat(slots).to(device),
        sinks=torch.randn(num_heads, generator=generator).to(device),
        query_lens_cpu=tuple(query_lens),
        seq_lens_cpu=tuple(seq_lens),
    )


def quantized(case: PagedCase) -> PagedCase:
    """The case with its pages in fp8, a scale for each token and head; slots that nobody wrote are NaN in both."""
    parts = {}
    for name in ("k", "v"):
        pages = getattr(case, f"{name}_pages").float()
        scales = pages.abs().amax(3) / 448  # [num_pages, num_kv_heads, page_size]
        parts[f"{name}_pages"] = (pages / scales[..., None]).to(torch.float8_e4m3fn)
        parts[f"{name}_scales"] = scales
    return dataclasses.replace(case, **parts)
