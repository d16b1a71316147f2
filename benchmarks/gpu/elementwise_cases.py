"""The small ops between the linears: norms, activation, rotary embedding with the store of keys and values.

Shapes of Llama-3-8B. FlashInfer's forms are there where its modules are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import hf_accel_kernels
from benchmarks.gpu import flashinfer_forms
from benchmarks.gpu.context import Context, NotThere
from benchmarks.gpu.kernel_case import Form, Problem
from benchmarks.gpu.timing import num_sets
from hf_accel_kernels import torch_attention

HIDDEN, INTERMEDIATE, HEADS = 4096, 14336, (32, 8, 128)
EPS, PAGE_SIZE = 1e-5, 16


def op(name: str) -> Callable[..., Any]:
    """An op of the contract, in whichever module it stands. Raises NotThere."""
    for module in pkgutil.iter_modules(hf_accel_kernels.__path__, "hf_accel_kernels."):
        if not module.ispkg and "reference" not in module.name:
            found = getattr(importlib.import_module(module.name), name, None)
            if callable(found):  # a module may have the op's name
                return found
    raise NotThere(f"hf_accel_kernels has no {name}")


def _rows(ctx: Context, num_tokens: int, width: int, traffic: float) -> torch.Tensor:
    """[sets, num_tokens, width]; `traffic`: how often a call moves as many bytes."""
    sets = num_sets(traffic * num_tokens * width * 2, ctx.device)
    return torch.empty(sets, num_tokens, width, device=ctx.device, dtype=ctx.dtype).normal_()


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As HF's modules compute it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rms_norm(ctx: Context, num_tokens: int) -> Problem:
    """Rows in, normed rows out."""
    x = _rows(ctx, num_tokens, ctx.pick(HIDDEN, 48), 2)
    weight = torch.rand(x.shape[2], device=x.device, dtype=x.dtype) + 0.5
    problem = Problem(2 * x[0].nbytes, 0, x.shape[0], reference=lambda: _norm(x[0], weight))

    @problem.form("hf_accel")
    def ours() -> Form:
        call = op("rms_norm")
        return Form(lambda i: call(x[i], weight, EPS))

    @problem.form("flashinfer")
    def theirs() -> Form:
        norm = flashinfer_forms.library(x.device).rmsnorm
        return Form(lambda i: norm(x[i], weight, eps=EPS))

    problem.form("torch")(lambda: Form(lambda i: F.rms_norm(x[i], weight.shape, weight, EPS)))
    return problem


def add_rms_norm(ctx: Context, num_tokens: int) -> Problem:
    """The sum of rows and residual, and its norm; compared: both, one under the other."""
    x = _rows(ctx, num_tokens, ctx.pick(HIDDEN, 48), 4)
    residual = torch.empty_like(x).normal_()
    weight = torch.rand(x.shape[2], device=x.device, dtype=x.dtype) + 0.5

    def in_torch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        total = x[i] + residual[i]
        return _norm(total, weight), total

    problem = Problem(4 * x[0].nbytes, 0, x.shape[0], reference=lambda: torch.stack(in_torch(0)))

    @problem.form("hf_accel")
    def ours() -> Form:
        call = op("add_rms_norm")
        return Form(
            lambda i: call(x[i], residual[i], weight, EPS),
            result=lambda: torch.stack(tuple(call(x[0].clone(), residual[0].clone(), weight, EPS))),
        )

    @problem.form("flashinfer")
    def theirs() -> Form:
        norm = flashinfer_forms.library(x.device).fused_add_rmsnorm

        def result() -> torch.Tensor:
            a, b = x[0].clone(), residual[0].clone()
            norm(a, b, weight, eps=EPS)
            return torch.stack((a, b))

        return Form(lambda i: norm(x[i], residual[i], weight, eps=EPS), result=result)

    problem.form("torch")(lambda: Form(in_torch, result=lambda: torch.stack(in_torch(0))))
    return problem


def swiglu(ctx: Context, num_tokens: int) -> Problem:
    """silu(gate) * up of the two halves of a row."""
    width = ctx.pick(INTERMEDIATE, 40)
    x = _rows(ctx, num_tokens, 2 * width, 1.5)

    def in_torch(i: int) -> torch.Tensor:
        return F.silu(x[i, :, :width]) * x[i, :, width:]

    problem = Problem(1.5 * x[0].nbytes, 0, x.shape[0], reference=lambda: in_torch(0))

    @problem.form("hf_accel")
    def ours() -> Form:
        call = op("swiglu")
        return Form(lambda i: call(x[i]))

    @problem.form("flashinfer")
    def theirs() -> Form:
        call = flashinfer_forms.library(x.device).silu_and_mul
        return Form(lambda i: call(x[i]))

    problem.form("torch")(lambda: Form(in_torch))
    return problem


def rope_and_store(ctx: Context, num_tokens: int) -> Problem:
    """Rotate queries and keys and write keys and values to their pages; compared: the queries, then the pages' keys."""
    num_heads, num_kv_heads, head_dim = ctx.pick(HEADS, (4, 2, 16))
    qkv = _rows(ctx, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, 2)
    sets, where = qkv.shape[0], {"device": ctx.device, "dtype": ctx.dtype}
    num_pages = -(-num_tokens // PAGE_SIZE) + 1
    k_pages, v_pages = (torch.zeros(sets, num_pages, num_kv_heads, PAGE_SIZE, head_dim, **where) for _ in range(2))
    slots = torch.randperm(num_pages * PAGE_SIZE, device=ctx.device)[:num_tokens]
    angles = torch.rand(num_tokens, head_dim // 2, device=ctx.device) * 6
    tables = [torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin)]  # float32, a row a position
    positions = torch.arange(num_tokens, device=ctx.device)
    cos, sin = (table.to(ctx.dtype) for table in tables)

    def heads(i: int) -> tuple[torch.Tensor, ...]:
        split = qkv[i].view(num_tokens, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), 1)
        return tuple(split)

    def in_torch(i: int) -> torch.Tensor:
        q, k, v = heads(i)
        q, k = (x * cos[:, None] + _rotate_half(x) * sin[:, None] for x in (q, k))
        torch_attention.store_kv(k, v, k_pages[i], v_pages[i], slots)
        return q

    def compared(run: Callable[[int], torch.Tensor]) -> torch.Tensor:
        k_pages[0].zero_(), v_pages[0].zero_()
        q = run(0)
        return torch.cat((q.flatten(), k_pages[0].flatten(), v_pages[0].flatten()))

    problem = Problem(2 * qkv[0].nbytes, 0, sets, reference=lambda: compared(in_torch))

    @problem.form("hf_accel")
    def ours() -> Form:
        call = op("rope_and_store")

        def run(i: int) -> torch.Tensor:
            return call(*heads(i), positions, *tables, k_pages[i], v_pages[i], slots)

        return Form(run, result=lambda: compared(run))

    problem.form("torch")(lambda: Form(in_torch, result=lambda: compared(in_torch), capture=False))
    return problem


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)
