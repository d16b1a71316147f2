"""A stand-in for FlashInfer 0.7.2: its wrappers' signatures, checks and meaning of plan and run, computed by torch on the CPU.

Written from the library's documentation and behaviour, to be as strict as it is: what the real one refuses is refused, and what
it reads (page ids up to `indptr`, keys up to the last page's length) is all that is read.
"""

from __future__ import annotations

import math
import types
from dataclasses import dataclass

import torch

CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8, 16)


class Reserved:
    """Buffers of a captured graph: a plan copies into them, a run reads them."""

    def __init__(self, buffers: dict[str, torch.Tensor | None], graph: bool) -> None:
        self.graph = graph
        if graph:
            assert all(isinstance(b, torch.Tensor) and b.dtype == torch.int32 for b in buffers.values())
        self.held = dict(buffers)

    def take(self, **sources: torch.Tensor) -> None:
        for name, source in sources.items():
            assert source.dtype == torch.int32 and source.ndim == 1, name
            if not self.graph:
                self.held[name] = source.clone()
                continue
            target = self.held[name]
            assert target is not None
            if name == "indices":
                assert len(source) <= len(target)
                target[: len(source)].copy_(source)
                target[len(source) :] = 1 << 30  # whoever reads on fails
            else:
                assert target.shape == source.shape, name
                target.copy_(source)


def attend(q, keys, values, *, scale, causal, window_left, softcap):
    """One request: q [rows, heads, dim], keys and values [length, kv_heads, dim]; bottom-right aligned."""
    rows, length, group = q.shape[0], keys.shape[0], q.shape[1] // keys.shape[1]
    if not length:
        return torch.zeros(rows, q.shape[1], values.shape[2], dtype=q.dtype)
    keys, values = (t.repeat_interleave(group, 1).double() for t in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    key, query = torch.arange(length)[None], length - rows + torch.arange(rows)[:, None]
    hidden = torch.zeros(rows, length, dtype=torch.bool)
    if causal:
        hidden |= key > query
    if window_left >= 0:
        hidden |= key < query - window_left
    logits = logits.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", torch.softmax(logits, -1), values).to(q.dtype)


class PagedWrapper:
    """What the two wrappers over pages of keys and values share."""

    def _init(self, float_workspace_buffer, kv_layout, graph, buffers):
        assert float_workspace_buffer.dtype == torch.uint8 and not float_workspace_buffer.any()
        assert kv_layout in ("NHD", "HND")
        self._layout, self._reserved, self._planned = kv_layout, Reserved(buffers, graph), None
        self.num_plans = 0

    def _keep(self, heads, kv_heads, head_dim, page_size, q_type, kv_type, **options):
        assert heads % kv_heads == 0
        self._planned = dict(options, sizes=(heads, kv_heads, head_dim, page_size), q=q_type, kv=kv_type or q_type)
        self.num_plans += 1

    def _run(self, q, paged_kv_cache, qo_indptr, window_left):
        plan, held = self._planned, self._reserved.held
        k, v = paged_kv_cache
        if self._layout == "HND":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        assert q.dtype == plan["q"] and k.dtype == v.dtype == plan["kv"] and q.stride(-1) == 1
        assert (q.shape[1], k.shape[2], q.shape[2], k.shape[1]) == plan["sizes"] and v.shape == k.shape
        assert window_left is None or window_left == plan["window_left"]
        if q.shape[0] != int(qo_indptr[-1]):
            raise ValueError(f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1]")
        scale = plan["sm_scale"] or 1 / math.sqrt(q.shape[2])
        out = torch.full_like(q, float("nan"))
        indptr, last = held["indptr"].tolist(), held["last_page_len"].tolist()
        for i in range(len(last)):
            rows = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
            pages = held["indices"][indptr[i] : indptr[i + 1]].long()
            length = max(len(pages) - 1, 0) * k.shape[1] + last[i]
            parts = [t[pages].flatten(0, 1)[:length] for t in (k, v)]
            options = {"causal": plan["causal"], "window_left": plan["window_left"], "softcap": plan["softcap"]}
            out[rows] = attend(q[rows], *parts, scale=scale, **options)
        return out


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
        jit_args=None,
    ):
        buffers = {
            "indptr": paged_kv_indptr_buffer,
            "indices": paged_kv_indices_buffer,
            "last_page_len": paged_kv_last_page_len_buffer,
        }
        self._init(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self._tensor_cores = use_tensor_cores

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        pos_encoding_mode="NONE",
        window_left=-1,
        window_right=0,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        non_blocking=True,
        block_tables=None,
        seq_lens=None,
        fixed_split_size=None,
        disable_split_kv=False,
        q_len_per_req=1,
        is_causal=None,
    ):
        if not self._tensor_cores and num_qo_heads // num_kv_heads not in CUDA_CORE_GROUPS:
            raise ValueError(f"Unsupported group_size: {num_qo_heads // num_kv_heads}")
        assert indptr.device.type == last_page_len.device.type == "cpu", "else the host waits for the device"
        self._reserved.take(indptr=indptr, indices=indices, last_page_len=last_page_len)
        sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        options = {"window_left": window_left, "softcap": logits_soft_cap or 0.0, "sm_scale": sm_scale}
        self._keep(*sizes, q_data_type, kv_data_type, causal=False, **options)

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        enable_pdl=None,
        window_left=None,
        sinks=None,
        q_len_per_req=None,
        skip_softmax_threshold_scale_factor=None,
        kv_cache_sf=None,
    ):
        return self._run(q, paged_kv_cache, torch.arange(len(self._reserved.held["last_page_len"]) + 1), window_left)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
        jit_args=None,
        jit_kwargs=None,
        variant_owns_mask=False,
    ):
        self._init(float_workspace_buffer, kv_layout, use_cuda_graph, {})

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
        prefix_len_ptr=None,
        token_pos_in_items_ptr=None,
        token_pos_in_items_len=0,
        max_item_len_ptr=None,
        seq_lens=None,
        seq_lens_q=None,
        block_tables=None,
        max_token_per_sequence=None,
        max_sequence_kv=None,
        fixed_split_size=None,
        disable_split_kv=False,
        uniform_q_len=None,
    ):
        assert {t.device.type for t in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)} == {"cpu"}
        held = {"indptr": paged_kv_indptr, "indices": paged_kv_indices, "last_page_len": paged_kv_last_page_len}
        self._reserved.take(qo_indptr=qo_indptr, **held)
        sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        options = {"window_left": window_left, "softcap": logits_soft_cap or 0.0, "sm_scale": sm_scale}
        self._keep(*sizes, q_data_type, kv_data_type, causal=causal, **options)

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        lse_base="log2",
        lse_layout="NH",
        enable_pdl=None,
        window_left=None,
        sinks=None,
        kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None,
        uses_spcompress=None,
    ):
        return self._run(q, paged_kv_cache, self._reserved.held["qo_indptr"], window_left)


@dataclass(frozen=True)
class MLAPlanMetadata:
    tensors: tuple

    @classmethod
    def csr(cls, qo_indptr, kv_indptr, kv_indices, kv_len_arr):
        return cls((qo_indptr, kv_indptr, kv_indices, kv_len_arr))


class BatchMLAPagedAttentionWrapper:
    def __init__(
        self,
        float_workspace_buffer,
        use_cuda_graph=False,
        qo_indptr=None,
        kv_indptr=None,
        kv_indices=None,
        kv_len_arr=None,
        backend="auto",
    ):
        buffers = {"qo_indptr": qo_indptr, "indptr": kv_indptr, "indices": kv_indices, "lens": kv_len_arr}
        self._reserved, self._planned = Reserved(buffers, use_cuda_graph), None

    def plan(
        self,
        *,
        metadata,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
        use_profiler=False,
        query_layout="packed",
        kv_cache_layout="packed",
        lse_mode="none",
        output_dtype=None,
        output_scale="none",
        scale_mode="default",
        skip_softmax=False,
        enable_pdl=None,
        use_sinks=False,
    ):
        assert isinstance(metadata, MLAPlanMetadata)
        qo_indptr, kv_indptr, kv_indices, kv_len_arr = metadata.tensors
        if not torch.equal((kv_len_arr + page_size - 1) // page_size, kv_indptr.diff()):
            raise ValueError("CSR metadata page counts in kv_indptr must equal ceil(kv_len_arr / page_size).")
        if q_data_type not in (torch.float16, torch.bfloat16) or head_dim_ckv % 128 or head_dim_kpe % 64:
            raise ValueError("unsupported")
        query_lens = qo_indptr.diff().tolist()
        tile = 64 * (2 if sum(query_lens) * num_heads // len(query_lens) > 64 else 1)
        if causal and tile % num_heads and max(query_lens) * num_heads > tile:
            raise ValueError("MLA causal tile boundary is unsupported")
        self._reserved.take(qo_indptr=qo_indptr, indptr=kv_indptr, indices=kv_indices, lens=kv_len_arr)
        self._planned = (num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type)

    def run(self, *, query, kv_cache, out=None, lse=None, return_lse=False):
        heads, ckv, kpe, page_size, causal, scale, dtype = self._planned
        assert query.shape[1:] == (heads, ckv + kpe) and query.dtype == kv_cache.dtype == dtype
        assert kv_cache.shape[1:] == (page_size, ckv + kpe)
        held = self._reserved.held
        indptr, starts, lens = (held[name].tolist() for name in ("indptr", "qo_indptr", "lens"))
        out = torch.full((*query.shape[:2], ckv), float("nan"), dtype=dtype)
        for i, length in enumerate(lens):
            rows = kv_cache[held["indices"][indptr[i] : indptr[i + 1]].long()].flatten(0, 1)[:length, None]
            tokens = slice(starts[i], starts[i + 1])
            options = {"scale": scale, "causal": causal, "window_left": -1, "softcap": 0.0}
            out[tokens] = attend(query[tokens], rows, rows[..., :ckv], **options)
        return out


def install(monkeypatch) -> None:
    """Let `import flashinfer` and `import flashinfer.mla` find this module's wrappers for one test."""
    mla = types.ModuleType("flashinfer.mla")
    mla.BatchMLAPagedAttentionWrapper, mla.MLAPlanMetadata = BatchMLAPagedAttentionWrapper, MLAPlanMetadata
    package = types.ModuleType("flashinfer")
    package.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    package.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    package.mla, package.__path__ = mla, []
    for module in (package, mla):
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
