"""Latent attention of DeepSeek models in decode: absorbed queries of one token a sequence over pages of latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu import flashinfer_forms
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernel_case import Form, Problem, with_hints
from benchmarks.gpu.timing import num_sets
from hf_accel_kernels import mla, mla_torch

RANK, ROPE = 512, 64
SMOKE_RANK, SMOKE_ROPE = 48, 16


@dataclass
class LatentInputs:
    """`sets` of equal shapes: queries and pages of their own, shared tables."""

    q: torch.Tensor  # [sets, num_seqs, num_heads, rank + rope]
    pages: torch.Tensor  # [sets, num_pages, page_size, rank + rope]
    scales: torch.Tensor | None  # [sets, num_pages, page_size, 2] float32
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    rank: int

    @property
    def scale(self) -> float:
        return (128 + ROPE) ** -0.5

    def arguments(self, i: int) -> tuple[torch.Tensor, ...]:
        """Positional arguments of `mla.mla_attention` but the scale, for set i."""
        return self.q[i], self.pages[i], self.page_table, self.seq_lens, self.query_start_loc


def make_inputs(ctx: Context, num_seqs: int, seq_len: int, num_heads: int, fp8: bool, page_size: int) -> LatentInputs:
    """Random rows, stored as `mla_store` would."""
    rank, rope = ctx.pick((RANK, ROPE), (SMOKE_RANK, SMOKE_ROPE))
    pages_of = -(-seq_len // page_size)
    num_pages, width, where = num_seqs * pages_of, rank + rope, {"device": ctx.device, "dtype": ctx.dtype}
    sets = num_sets(num_pages * page_size * width * (1 if fp8 else 2), ctx.device)
    pages, scales = torch.empty(sets, num_pages, page_size, width, **where).normal_(), None
    if fp8:
        rows, pages = pages, torch.empty(pages.shape, dtype=mla_torch.FP8, device=ctx.device)
        scales = torch.empty(sets, num_pages, page_size, 2, dtype=torch.float32, device=ctx.device)
        slots = torch.arange(num_pages * page_size, device=ctx.device)
        for i in range(sets):
            flat = rows[i].flatten(0, 1)
            mla_torch.mla_store(flat[:, :rank], flat[:, rank:], pages[i], slots, scales[i])
    order = torch.randperm(num_pages, device=ctx.device).to(torch.int32)
    return LatentInputs(
        torch.empty(sets, num_seqs, num_heads, width, **where).normal_(),
        pages,
        scales,
        order.view(num_seqs, pages_of),
        torch.full((num_seqs,), seq_len, dtype=torch.int32, device=ctx.device),
        torch.arange(num_seqs + 1, dtype=torch.int32, device=ctx.device),
        rank,
    )


def decode(ctx: Context, num_heads: int, fp8: bool = False, page_size: int = 16) -> Problem:
    """64 sequences of 4k tokens."""
    num_seqs, seq_len = ctx.pick((64, 4096), (2, 40))
    x = make_inputs(ctx, num_seqs, seq_len, num_heads, fp8, page_size)
    sets, _, _, width = x.q.shape
    kv_bytes = num_seqs * seq_len * (width * x.pages.itemsize + (8 if fp8 else 0))
    in_torch = torch.empty(num_seqs, num_heads, x.rank, dtype=x.q.dtype, device=ctx.device)

    def plain(i: int) -> torch.Tensor:
        scales = None if x.scales is None else x.scales[i]
        mla_torch.mla_attention(*x.arguments(i), x.scale, x.rank, scales, in_torch)
        return in_torch

    problem = Problem(
        num_bytes=kv_bytes + num_seqs * num_heads * (width + x.rank) * x.q.itemsize,
        flops=2 * num_heads * num_seqs * seq_len * (width + x.rank),
        sets=sets,
        reference=lambda: plain(0).clone(),
    )

    @problem.form("hf_accel")
    def ours() -> Form:
        out = torch.empty_like(in_torch)
        op = with_hints(mla.mla_attention, num_decode_rows=num_seqs, max_query_len=1, max_seq_len=seq_len)

        def call(i: int) -> torch.Tensor:
            scales = None if x.scales is None else x.scales[i]
            return op(*x.arguments(i), x.scale, rank=x.rank, scales=scales, out=out)

        return Form(call)

    for backend in ("fa3", "fa2"):
        problem.form(f"flashinfer, {backend}")(lambda backend=backend: flashinfer_forms.mla_decode(x, backend))
    problem.form("torch")(lambda: Form(plain, capture=False))
    return problem
