"""FlashInfer's kernels on the inputs of the cases: planned once on the host, run on set i. Imports it only when asked.

Keyword arguments only, as its signatures move; a module that is neither built nor may be built raises, and the row says so.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.context import NotThere
from benchmarks.gpu.kernel_case import Form

if TYPE_CHECKING:
    from benchmarks.gpu.attention_cases import PagedInputs
    from benchmarks.gpu.mla_cases import LatentInputs

WORKSPACE_BYTES = 256 << 20


def library(device: torch.device) -> Any:
    """The package. Raises NotThere where it is not installed, or for CPU tensors."""
    if device.type != "cuda":
        raise NotThere("FlashInfer needs a CUDA device")
    try:
        return importlib.import_module("flashinfer")
    except Exception as error:  # a broken dependency raises whatever it likes
        raise NotThere(f"flashinfer: {type(error).__name__}: {error}") from error


def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _page_lists(page_table: torch.Tensor, seq_lens_cpu: list[int], page_size: int) -> dict[str, torch.Tensor]:
    """CSR of full page tables; index pointers and last lengths on the host, as `plan` reads them there."""
    num_seqs, pages_of = page_table.shape
    last = [(n - 1) % page_size + 1 for n in seq_lens_cpu]
    return {
        "indptr": torch.arange(0, num_seqs * pages_of + 1, pages_of, dtype=torch.int32),
        "indices": page_table.flatten().contiguous(),
        "last_page_len": torch.tensor(last, dtype=torch.int32),
    }


def decode(x: PagedInputs, tensor_cores: bool) -> Form:
    """BatchDecodeWithPagedKVCacheWrapper."""
    flashinfer = library(x.q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(x.q.device), kv_layout="HND", use_tensor_cores=tensor_cores
    )
    wrapper.plan(
        **_page_lists(x.page_table, x.seq_lens_cpu, x.k_pages.shape[3]),
        num_qo_heads=x.q.shape[2],
        num_kv_heads=x.k_pages.shape[2],
        head_dim=x.q.shape[3],
        page_size=x.k_pages.shape[3],
        q_data_type=x.q.dtype,
        kv_data_type=x.k_pages.dtype,
        sm_scale=x.scale,
    )
    out = torch.empty_like(x.q[0])
    return Form(lambda i: wrapper.run(x.q[i], (x.k_pages[i], x.v_pages[i]), out=out))


def prefill(x: PagedInputs, backend: str) -> Form:
    """BatchPrefillWithPagedKVCacheWrapper, causal from the bottom right."""
    flashinfer = library(x.q.device)
    lists = _page_lists(x.page_table, x.seq_lens_cpu, x.k_pages.shape[3])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(x.q.device), kv_layout="HND", backend=backend)
    wrapper.plan(
        qo_indptr=x.query_start_loc.cpu(),
        **{f"paged_kv_{name}": value for name, value in lists.items()},
        num_qo_heads=x.q.shape[2],
        num_kv_heads=x.k_pages.shape[2],
        head_dim_qk=x.q.shape[3],
        page_size=x.k_pages.shape[3],
        causal=True,
        q_data_type=x.q.dtype,
        kv_data_type=x.k_pages.dtype,
        sm_scale=x.scale,
    )
    out = torch.empty_like(x.q[0])
    return Form(lambda i: wrapper.run(x.q[i], (x.k_pages[i], x.v_pages[i]), out=out))


def mla_decode(x: LatentInputs, backend: str) -> Form:
    """BatchMLAPagedAttentionWrapper on packed rows, one query a sequence."""
    library(x.q.device)
    if x.scales is not None:
        raise NotThere("FlashInfer has no scales for each token of fp8 latents")
    mla = importlib.import_module("flashinfer.mla")
    device, (num_seqs, pages_of) = x.q.device, x.page_table.shape
    wrapper = mla.BatchMLAPagedAttentionWrapper(_workspace(device), backend=backend)
    metadata = mla.MLAPlanMetadata.csr(
        qo_indptr=torch.arange(num_seqs + 1, dtype=torch.int32),
        kv_indptr=torch.arange(0, num_seqs * pages_of + 1, pages_of, dtype=torch.int32),
        kv_indices=x.page_table.flatten().contiguous(),
        kv_len_arr=x.seq_lens.cpu(),
    )
    wrapper.plan(
        metadata=metadata,
        num_heads=x.q.shape[2],
        head_dim_ckv=x.rank,
        head_dim_kpe=x.q.shape[3] - x.rank,
        page_size=x.pages.shape[2],
        causal=False,
        sm_scale=x.scale,
        q_data_type=x.q.dtype,
        kv_data_type=x.pages.dtype,
        query_layout="packed",
        kv_cache_layout="packed",
    )
    out = torch.empty(x.q.shape[1], x.q.shape[2], x.rank, dtype=x.q.dtype, device=device)
    return Form(lambda i: wrapper.run(query=x.q[i], kv_cache=x.pages[i], out=out))
