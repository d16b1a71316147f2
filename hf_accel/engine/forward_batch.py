"""One step's tensors. The builder owns the page table (one row a running request) and turns a SchedulerOutput into them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_accel.engine.upload import upload
from hf_accel.scheduler.output import UNKNOWN_TOKEN, ScheduledRequest, SchedulerOutput

if TYPE_CHECKING:
    from hf_accel.engine.decode_buffers import DecodeBuffers, StagedStep


@dataclass(frozen=True)
class ForwardBatch:
    """The packed tokens of one step, over all its requests, in order.

    Attributes:
        input_ids: [num_tokens] int64; `UNKNOWN_TOKEN` where the device's token table has the token.
        positions: [num_tokens] int64.
        slot_mapping: [num_tokens] int64, page * page_size + offset of each token's KV.
        page_table: [num_seqs, max_pages] int32.
        seq_lens: [num_seqs] int32, context length including this step's tokens.
        query_start_loc: [num_seqs + 1] int32.
        logits_indices: [num_logits] int64, tokens whose logits are needed.
        query_lens_cpu: tokens of each request in this step.
        seq_lens_cpu: `seq_lens` on the host.
        num_logits_cpu: rows of logits that each request gets.
        drafts_cpu: of each request the guesses among its tokens, the last ones; empty if nobody has any.
        token_slots: [num_tokens] int64, the row of the token table of each token's request; None without a token table.
        has_unknown: whether an input id is `UNKNOWN_TOKEN`.
        staged: what `upload` must bring to the device first, where the tensors are the persistent buffers of decode steps.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    logits_indices: torch.Tensor
    query_lens_cpu: tuple[int, ...]
    seq_lens_cpu: tuple[int, ...]
    num_logits_cpu: tuple[int, ...]
    drafts_cpu: tuple[tuple[int, ...], ...] = ()
    token_slots: torch.Tensor | None = None
    has_unknown: bool = False
    staged: StagedStep | None = None

    def upload(self) -> None:
        """Make the tensors hold this step; called when its turn comes, before any of them is read."""
        if self.staged is not None:
            self.staged.upload()


class ForwardBatchBuilder:
    """Keeps the page table of the running requests and builds batches from diffs: no work grows with the context.

    Batches share no memory with the table, which changes while they run. With `token_table` they say each token's slot;
    with `buffers`, the decode steps that fit in are built in them.
    """

    def __init__(
        self,
        max_num_seqs: int,
        page_size: int,
        device: torch.device,
        *,
        token_table: bool = False,
        buffers: DecodeBuffers | None = None,
    ) -> None:
        self.page_size = page_size
        self.device = device
        self._buffers = buffers
        self._on_cpu = device.type == "cpu"
        self._token_table = token_table
        self._table = np.zeros((max_num_seqs, 64), dtype=np.int32)  # [slot, page index]
        self._counts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def build(self, output: SchedulerOutput) -> ForwardBatch:
        """Apply the step's page-table changes and build its tensors on the device."""
        requests = output.requests
        for item in requests:
            if item.page_updates:
                self._update_row(item.slot, item.page_updates)
        if output.num_tokens == len(requests) and all(r.num_logits == 1 for r in requests):
            return self._build_decode(requests)
        return self._build_mixed(output)

    def _build_decode(self, requests: tuple[ScheduledRequest, ...]) -> ForwardBatch:
        """One token and one row of logits each: the step that runs most often, so with few array operations: each one
        starts with cold caches after a forward."""
        num_seqs, page_size, page_of = len(requests), self.page_size, self._table.item
        token_ids = [r.token_ids[0] for r in requests]
        positions = [r.start for r in requests]
        slots = [r.slot for r in requests]
        mapping = [
            page_of(s, p // page_size) * page_size + p % page_size for s, p in zip(slots, positions, strict=True)
        ]
        seq_lens = [p + 1 for p in positions]
        num_pages = max(positions) // page_size + 1
        if self._buffers is not None and self._buffers.takes(num_seqs, num_pages):
            staged = self._buffers.stage(token_ids, positions, mapping, slots)
            return replace(
                self._buffers.rows(seq_lens, num_pages),
                staged=staged,
                token_slots=self._buffers.slots[:num_seqs] if self._token_table else None,
                has_unknown=UNKNOWN_TOKEN in token_ids,
            )
        columns = (token_ids, positions, mapping, slots) if self._token_table else (token_ids, positions, mapping)
        longs = self._device(columns, np.int64)
        query_start_loc, logits_indices = self._one_token_each(num_seqs)
        ones = (1,) * num_seqs
        return ForwardBatch(
            input_ids=longs[0],
            positions=longs[1],
            slot_mapping=longs[2],
            page_table=self._device(self._table[slots, :num_pages], np.int32),
            seq_lens=self._device(seq_lens, np.int32),
            query_start_loc=query_start_loc,
            logits_indices=logits_indices,
            query_lens_cpu=ones,
            seq_lens_cpu=tuple(seq_lens),
            num_logits_cpu=ones,
            token_slots=longs[3] if self._token_table else None,
            has_unknown=UNKNOWN_TOKEN in token_ids,
        )

    def _one_token_each(self, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`query_start_loc` and `logits_indices` of a decode step: the same for every step of so many requests."""
        held = self._counts.get(num_seqs)
        if held is None:
            counts = np.arange(num_seqs + 1)
            held = self._counts[num_seqs] = (self._device(counts, np.int32), self._device(counts[:-1], np.int64))
        return held

    def _build_mixed(self, output: SchedulerOutput) -> ForwardBatch:
        """Any mix of prefill chunks and decodes."""
        requests = output.requests
        slots = np.array([r.slot for r in requests], dtype=np.int64)
        starts = np.array([r.start for r in requests], dtype=np.int64)
        lens = np.array([len(r.token_ids) for r in requests], dtype=np.int64)
        seq_lens = starts + lens
        query_start = np.zeros(len(requests) + 1, dtype=np.int64)
        np.cumsum(lens, out=query_start[1:])
        offsets = np.arange(output.num_tokens, dtype=np.int64) - np.repeat(query_start[:-1], lens)
        positions, rows = np.repeat(starts, lens) + offsets, np.repeat(slots, lens)
        pages = self._table[rows, positions // self.page_size].astype(np.int64)
        max_pages = -(-int(seq_lens.max()) // self.page_size)
        num_logits = [r.num_logits for r in requests]
        indices = [
            i for r, end in zip(requests, query_start[1:].tolist(), strict=True) for i in range(end - r.num_logits, end)
        ]
        return ForwardBatch(
            input_ids=self._device([t for r in requests for t in r.token_ids], np.int64),
            positions=self._device(positions, np.int64),
            slot_mapping=self._device(pages * self.page_size + positions % self.page_size, np.int64),
            page_table=self._device(self._table[slots, :max_pages], np.int32),
            seq_lens=self._device(seq_lens, np.int32),
            query_start_loc=self._device(query_start, np.int32),
            logits_indices=self._device(indices, np.int64),
            query_lens_cpu=tuple(lens.tolist()),
            seq_lens_cpu=tuple(seq_lens.tolist()),
            num_logits_cpu=tuple(num_logits),
            drafts_cpu=_drafts_of(requests),
            token_slots=self._device(rows, np.int64) if self._token_table else None,
            has_unknown=any(r.token_ids[0] == UNKNOWN_TOKEN for r in requests),
        )

    def _update_row(self, slot: int, updates: tuple[tuple[int, int], ...]) -> None:
        last = max(index for index, _ in updates)
        if last >= self._table.shape[1]:
            width = max(last + 1, 2 * self._table.shape[1])
            self._table = np.pad(self._table, ((0, 0), (0, width - self._table.shape[1])))
        for index, page in updates:
            self._table[slot, index] = page
        if self._buffers is not None:
            self._buffers.note(slot, updates)

    def _device(self, values: object, dtype: type) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        return tensor if self._on_cpu else upload(tensor, tensor.dtype, self.device)


def _drafts_of(requests: tuple[ScheduledRequest, ...]) -> tuple[tuple[int, ...], ...]:
    if not any(r.num_drafted for r in requests):
        return ()
    return tuple(r.token_ids[len(r.token_ids) - r.num_drafted :] for r in requests)
