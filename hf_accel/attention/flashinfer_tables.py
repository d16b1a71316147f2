"""A step's page tables as FlashInfer reads them: compressed rows, and the buffers that hold them for a captured step.

Owns the conversion. Imports nothing of the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import AttentionMetadata


class Tables:
    """A step's sequences as compressed rows: offsets and lengths on the host, page ids on the device."""

    def __init__(self, metadata: AttentionMetadata, page_size: int) -> None:
        pairs = list(zip(metadata.query_lens_cpu, metadata.seq_lens_cpu, strict=True))
        self.kept = [i for i, (query_len, _) in enumerate(pairs) if query_len]
        query_lens, seq_lens = ([pairs[i][side] for i in self.kept] for side in (0, 1))
        counts = [-(-n // page_size) for n in seq_lens]
        self.qo_indptr, self.kv_indptr = _offsets(query_lens), _offsets(counts)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        last = [n - (count - 1) * page_size if count else 0 for n, count in zip(seq_lens, counts)]
        self.last_page_len = torch.tensor(last, dtype=torch.int32)
        self.indices = self._page_ids(metadata, page_size, sum(counts), len(pairs))

    def _page_ids(self, metadata: AttentionMetadata, page_size: int, total: int, num_seqs: int) -> torch.Tensor:
        """[total] int32, every sequence's pages in order; computed on the device, whose work nobody waits for."""
        table, lens = metadata.page_table, metadata.seq_lens
        if len(self.kept) < num_seqs:
            kept = torch.tensor(self.kept).to(table.device, non_blocking=True)
            table, lens = table[kept], lens[kept]
        counts = (lens.long() + (page_size - 1)) // page_size
        row = torch.repeat_interleave(counts, output_size=total)
        column = torch.arange(total, device=table.device) - (counts.cumsum(0) - counts)[row]
        return table[row, column].to(torch.int32)


def _offsets(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


class GraphBuffers:
    """Tables at addresses that a captured graph reads, for a batch of `num_seqs` decode rows of up to `num_pages` each."""

    def __init__(self, num_seqs: int, num_pages: int, device: torch.device) -> None:
        def empty(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.qo_indptr = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        self.kv_indptr, self.indices = empty(num_seqs + 1), empty(num_seqs * num_pages)
        self.last_page_len, self.seq_lens = empty(num_seqs), empty(num_seqs)

    def arguments(self, shape: str) -> dict[str, Any]:
        """As the wrapper of a "decode" or "mla" step takes them."""
        if shape == "mla":
            names = {"qo_indptr": self.qo_indptr, "kv_indptr": self.kv_indptr}
            names |= {"kv_indices": self.indices, "kv_len_arr": self.seq_lens}
        else:
            names = {"paged_kv_indptr_buffer": self.kv_indptr, "paged_kv_indices_buffer": self.indices}
            names |= {"paged_kv_last_page_len_buffer": self.last_page_len}
        return {"use_cuda_graph": True, **names}
