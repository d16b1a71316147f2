"""Random paged batches of latents for tests and benchmarks of latent attention.

Owns the making of inputs: shuffled pages, NaN in every slot that no sequence wrote, page table entries of -1 beyond a
sequence's pages, query tensors with gaps between their rows. Of the ops it knows the slow store only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_accel_kernels import mla_reference

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class MlaCase:
    """One batch; `q` in latent space, `heads_q` as a model has it, both views into wider tensors."""

    q: torch.Tensor  # [num_tokens, num_heads, rank + rope]
    heads_q: torch.Tensor  # [num_tokens, num_heads, nope + rope]
    weight: torch.Tensor  # [num_heads * (nope + v), rank]
    pages: torch.Tensor
    scales: torch.Tensor | None
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    rank: int
    nope: int
    scale: float

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.page_table, self.seq_lens, self.query_start_loc


def make_mla_case(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_heads: int,
    rank: int = 40,
    rope: int = 8,
    nope: int = 24,
    v: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    seed: int = 0,
) -> MlaCase:
    """Shuffled pages; NaN in every slot that no sequence wrote, -1 in the page table beyond a sequence's pages."""
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-length // page_size) for length in seq_lens]
    num_pages = sum(pages_of) + 2
    order = torch.randperm(num_pages, generator=generator).to(torch.int32)
    page_table = torch.full((len(seq_lens), max(pages_of) + 1), -1, dtype=torch.int32)
    pages = torch.full((num_pages, page_size, rank + rope), float("nan")).to(FP8 if fp8 else dtype)
    scales = torch.full((num_pages, page_size, 2), float("nan")) if fp8 else None
    for i, length in enumerate(seq_lens):
        first = sum(pages_of[:i])
        page_table[i, : pages_of[i]] = order[first : first + pages_of[i]]
        position = torch.arange(length)
        slots = page_table[i, position // page_size].long() * page_size + position % page_size
        rows = torch.randn(length, rank + rope, generator=generator).to(dtype)
        mla_reference.mla_store(rows[:, :rank], rows[:, rank:], pages, slots, scales)
    num_tokens, width = sum(query_lens), rank + rope
    wide = torch.randn(num_tokens, num_heads + 1, width + nope + 3, generator=generator).to(dtype)
    return MlaCase(
        q=wide[:, :num_heads, :width] * 2,
        heads_q=wide[:, :num_heads, width - rope : width + nope],
        weight=(torch.randn(num_heads * (nope + v), rank, generator=generator) / rank**0.5).to(dtype),
        pages=pages,
        scales=scales,
        page_table=page_table,
        seq_lens=torch.tensor(list(seq_lens), dtype=torch.int32),
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        rank=rank,
        nope=nope,
        scale=width**-0.5,
    )
