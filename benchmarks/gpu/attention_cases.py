"""Paged attention: decode and prefill, as the engine calls it, beside FlashInfer and torch's own attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu import flashinfer_forms
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernel_case import Form, Problem, with_hints
from benchmarks.gpu.timing import num_sets
from hf_accel_kernels import ops, torch_attention

PAGE_SIZE = 16


@dataclass
class PagedInputs:
    """`sets` of equal shapes: queries and pages of their own, shared tables."""

    q: torch.Tensor  # [sets, num_tokens, num_heads, head_dim]
    k_pages: torch.Tensor  # [sets, num_pages, num_kv_heads, page_size, head_dim]
    v_pages: torch.Tensor
    page_table: torch.Tensor  # [num_seqs, pages of a sequence] int32, shuffled
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    query_lens_cpu: list[int]
    seq_lens_cpu: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def arguments(self, i: int) -> tuple[torch.Tensor, ...]:
        """Positional arguments of `ops.paged_attention` for set i."""
        return self.q[i], self.k_pages[i], self.v_pages[i], self.page_table, self.seq_lens, self.query_start_loc

    def dense(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the only sequence, [1, num_kv_heads, seq_len, head_dim]."""
        ids = self.page_table[0].long()
        return tuple(p[i][ids].transpose(0, 1).flatten(1, 2)[None, :, : self.seq_lens_cpu[0]] for p in self.pages)

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k_pages, self.v_pages


def make_inputs(ctx: Context, num_seqs: int, query_len: int, seq_len: int, heads: tuple[int, int, int]) -> PagedInputs:
    """Random pages of `num_seqs` equal sequences; `heads`: query heads, kv heads, head dim."""
    num_heads, num_kv_heads, head_dim = heads
    pages_of = -(-seq_len // PAGE_SIZE)
    kv_bytes = 2 * num_seqs * pages_of * PAGE_SIZE * num_kv_heads * head_dim * 2
    sets, where = num_sets(kv_bytes, ctx.device), {"device": ctx.device, "dtype": ctx.dtype}
    shape = (sets, num_seqs * pages_of, num_kv_heads, PAGE_SIZE, head_dim)
    k_pages, v_pages = (torch.empty(shape, **where).normal_() for _ in range(2))
    order = torch.randperm(num_seqs * pages_of, device=ctx.device).to(torch.int32)
    return PagedInputs(
        torch.empty(sets, num_seqs * query_len, num_heads, head_dim, **where).normal_(),
        k_pages,
        v_pages,
        order.view(num_seqs, pages_of),
        torch.full((num_seqs,), seq_len, dtype=torch.int32, device=ctx.device),
        torch.arange(0, num_seqs * query_len + 1, query_len, dtype=torch.int32, device=ctx.device),
        [query_len] * num_seqs,
        [seq_len] * num_seqs,
    )


def _problem(x: PagedInputs) -> Problem:
    """The forms that serve both decode and prefill."""
    sets, num_tokens, num_heads, head_dim = x.q.shape
    seen = sum(q * n - q * (q - 1) // 2 for q, n in zip(x.query_lens_cpu, x.seq_lens_cpu, strict=True))
    kv_bytes = 2 * sum(x.seq_lens_cpu) * x.k_pages.shape[2] * head_dim * x.q.itemsize

    def in_torch(i: int) -> torch.Tensor:
        q, k_pages, v_pages, page_table, seq_lens, _ = x.arguments(i)
        lens = (x.query_lens_cpu, x.seq_lens_cpu)
        return torch_attention.paged_attention(q, k_pages, v_pages, page_table, seq_lens, *lens, x.scale)

    problem = Problem(
        num_bytes=kv_bytes + 2 * num_tokens * num_heads * head_dim * x.q.itemsize,
        flops=4 * num_heads * head_dim * seen,
        sets=sets,
        reference=lambda: in_torch(0),
    )

    @problem.form("hf_accel")
    def ours() -> Form:
        out, longest = torch.empty_like(x.q[0]), max(x.query_lens_cpu)
        op = with_hints(
            ops.paged_attention,
            num_decode_rows=len(x.query_lens_cpu) if longest == 1 else 0,
            max_query_len=longest,
            max_seq_len=max(x.seq_lens_cpu),
        )
        return Form(lambda i: op(*x.arguments(i), x.scale, out=out))

    @problem.form("torch")
    def plain() -> Form:
        return Form(in_torch, capture=False)

    return problem


def decode(ctx: Context, num_seqs: int, seq_len: int, heads: tuple[int, int, int]) -> Problem:
    """One query a sequence."""
    x = make_inputs(ctx, num_seqs, 1, seq_len, heads)
    problem = _problem(x)
    for name, tensor_cores in (("flashinfer", True), ("flashinfer, cuda cores", False)):
        problem.form(name)(lambda tensor_cores=tensor_cores: flashinfer_forms.decode(x, tensor_cores))
    return problem


def prefill(ctx: Context, query_len: int, seq_len: int, heads: tuple[int, int, int]) -> Problem:
    """The last `query_len` tokens of one sequence."""
    x = make_inputs(ctx, 1, query_len, seq_len, heads)
    problem = _problem(x)
    for backend in ("fa3", "fa2"):
        problem.form(f"flashinfer, {backend}")(lambda backend=backend: flashinfer_forms.prefill(x, backend))

    @problem.form("sdpa")
    def sdpa() -> Form:
        """torch's attention on dense keys and values, gathered beforehand: what a flash kernel gives without pages."""
        group = x.q.shape[2] // x.k_pages.shape[2]
        dense = [tuple(t.repeat_interleave(group, 1) for t in x.dense(i)) for i in range(x.q.shape[0])]
        causal: dict[str, Any] = {"is_causal": True}
        if query_len != seq_len:
            causal = {"attn_mask": causal_lower_right(query_len, seq_len)}

        def call(i: int) -> torch.Tensor:
            q = x.q[i].transpose(0, 1)[None]
            return F.scaled_dot_product_attention(q, *dense[i], **causal)[0].transpose(0, 1)

        return Form(call)

    return problem
