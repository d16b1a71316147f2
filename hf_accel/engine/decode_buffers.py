"""The tensors of decode steps at addresses that stay, as a captured step reads them.

Owns the device's copy of the page table, the rows that pad a batch, and the pinned memory from which one copy a step fills
everything. A step is written to pinned memory when it is built and reaches the device when it runs, so it may be built while
the device still runs the one before. Knows nothing of graphs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hf_accel.engine.forward_batch import ForwardBatch

MOST_STAGINGS = 4
"""Pinned memories that are in turn; one more than that is waited for."""


class Event(Protocol):
    """A mark in the device's order of work, as `torch.cuda.Event`."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class PassedEvent:
    """On CPU a copy is made when it is asked for."""

    def record(self) -> None:
        """Nothing to mark."""

    def query(self) -> bool:
        """Always behind us."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Staging:
    """Pinned memory for one step: the same words as on the device, and the event after their copy."""

    def __init__(self, words: torch.Tensor, event: Event) -> None:
        self.words = words  # [num_words] int64
        self.longs = words.numpy()
        self.ints = words.view(torch.int32).numpy()
        self.event = event
        self.num_seqs = 0  # rows that are not padding


class StagingRing:
    """Hands out pinned memory; one whose copy may be under way is never handed out.

    Args:
        make: a new one.
    """

    def __init__(self, make: Callable[[], Staging]) -> None:
        self._make = make
        self._copied: deque[Staging] = deque()  # in the order of their copies
        self._num_made = 0

    def take(self) -> Staging:
        """Memory to write to. Waits only if `MOST_STAGINGS` are being copied."""
        if self._copied and (self._copied[0].event.query() or self._num_made >= MOST_STAGINGS):
            staging = self._copied.popleft()
            staging.event.synchronize()
            return staging
        self._num_made += 1
        return self._make()

    def give_back(self, staging: Staging) -> None:
        """The copy from it was just queued."""
        staging.event.record()
        self._copied.append(staging)


class DecodeBuffers:
    """Persistent inputs of decode-only steps of up to `max_batch` sequences.

    Rows behind a step's sequences are padding: one token at position 0 of a sequence of length 1 on the reserved page.

    Attributes:
        input_ids, positions, slot_mapping: [max_batch] int64.
        slots: [max_batch] int64, the page-table row of each sequence; `num_slots` for padding.
        seq_lens: [max_batch] int32.
        page_table: [max_batch, width] int32; of padding, the reserved page everywhere.
        query_start_loc: [max_batch + 1] int32, and logits_indices [max_batch] int64: never change.

    Args:
        max_batch: rows.
        num_slots: rows of the page table, of running requests.
        width: most pages of a sequence.
        page_size: tokens in a page.
        padding_page: the reserved page.
        device: where the buffers are.
        make_event: marks of the device's order.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        num_slots: int,
        width: int,
        page_size: int,
        padding_page: int,
        device: torch.device,
        make_event: Callable[[], Event] = PassedEvent,
    ) -> None:
        self.max_batch, self.num_slots, self.width = max_batch, num_slots, width
        self.device, self._make_event = device, make_event
        self._num_updates = num_updates = max(64, max_batch)
        num_longs = 4 * max_batch + num_updates
        self._num_words = num_longs + -(-(max_batch + num_updates) // 2)
        self._padding_slot, self._padding_page = padding_page * page_size, padding_page
        self._padding_cell = num_slots * width  # of the page table: the padding row's first
        self._words = torch.zeros(self._num_words, dtype=torch.int64, device=device)
        longs = self._words[: 4 * max_batch].view(4, max_batch)
        self.input_ids, self.positions, self.slot_mapping, self.slots = longs
        self._update_cells = self._words[4 * max_batch : num_longs]
        ints = self._words[num_longs:].view(torch.int32)
        self.seq_lens, self._update_pages = ints[:max_batch], ints[max_batch : max_batch + num_updates]
        self._first_int = 2 * num_longs
        self._table = torch.full((num_slots + 1, width), padding_page, dtype=torch.int32, device=device)
        self.page_table = torch.full((max_batch, width), padding_page, dtype=torch.int32, device=device)
        self.query_start_loc = torch.arange(max_batch + 1, dtype=torch.int32, device=device)
        self.logits_indices = torch.arange(max_batch, dtype=torch.int64, device=device)
        self._num_rows = 0  # of `page_table` that may hold something else than padding
        self._ring = StagingRing(self._make_staging)
        self._unsent: dict[int, int] = {}  # cell of the page table -> page that the device's copy lacks
        self._lock = threading.Lock()  # steps are built and run by different threads

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._words.nbytes + self._table.nbytes + self.page_table.nbytes

    def note(self, slot: int, updates: Sequence[tuple[int, int]]) -> None:
        """Take (index, page) changes of one row of the page table; the device learns of them with the next step."""
        first, width = slot * self.width, self.width
        with self._lock:
            self._unsent.update((first + index, page) for index, page in updates if index < width)

    def takes(self, num_seqs: int, num_pages: int) -> bool:
        """Whether a decode step of `num_seqs` sequences, of up to `num_pages` pages, fits in."""
        return num_seqs <= self.max_batch and num_pages <= self.width

    def stage(
        self, token_ids: Sequence[int], positions: Sequence[int], slot_mapping: Sequence[int], slots: Sequence[int]
    ) -> StagedStep:
        """Write a step that `takes` admits to pinned memory."""
        staging, count, most = self._ring.take(), len(token_ids), self.max_batch
        longs, ints, last = staging.longs, staging.ints[self._first_int :], max(len(token_ids), staging.num_seqs)
        rows = longs[: 4 * most].reshape(4, most)
        rows[:, :count] = (token_ids, positions, slot_mapping, slots)
        rows[:, count:last] = [[0], [0], [self._padding_slot], [self.num_slots]]
        ints[:count] = positions
        ints[:count] += 1
        ints[count:last] = 1
        staging.num_seqs = count
        with self._lock:
            updates = dict(self._unsent)
        fitting = min(len(updates), self._num_updates)
        cells, pages = longs[4 * most : 4 * most + self._num_updates], ints[most : most + self._num_updates]
        cells[:fitting], pages[:fitting] = list(updates)[:fitting], list(updates.values())[:fitting]
        cells[fitting:], pages[fitting:] = self._padding_cell, self._padding_page
        return StagedStep(self, staging, updates, self._overflow(updates))

    def upload(self, step: StagedStep) -> None:
        """Fill the buffers with a step, behind all that the device was given before; does not wait."""
        staging = step.staging
        self._words.copy_(staging.words, non_blocking=True)
        count = staging.num_seqs
        self._ring.give_back(staging)
        table = self._table.view(-1)
        if step.overflow is not None:
            cells, pages = step.overflow
            table.index_copy_(0, cells.to(self.device, non_blocking=True), pages.to(self.device, non_blocking=True))
        if step.updates:
            table.index_copy_(0, self._update_cells, self._update_pages)
        num_rows, self._num_rows = max(count, self._num_rows), count
        torch.index_select(self._table, 0, self.slots[:num_rows], out=self.page_table[:num_rows])
        with self._lock:
            for cell, page in step.updates.items():
                if self._unsent.get(cell) == page:
                    del self._unsent[cell]

    def rows(self, seq_lens_cpu: Sequence[int], num_pages: int | None = None) -> ForwardBatch:
        """The first rows of the buffers as a batch: one for each length, and `num_pages` (None: all) of the page table."""
        count = len(seq_lens_cpu)
        ones = (1,) * count
        return ForwardBatch(
            input_ids=self.input_ids[:count],
            positions=self.positions[:count],
            slot_mapping=self.slot_mapping[:count],
            page_table=self.page_table[:count, :num_pages],
            seq_lens=self.seq_lens[:count],
            query_start_loc=self.query_start_loc[: count + 1],
            logits_indices=self.logits_indices[:count],
            query_lens_cpu=ones,
            seq_lens_cpu=tuple(seq_lens_cpu),
            num_logits_cpu=ones,
        )

    def _overflow(self, updates: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The changes that the pinned words have no room for, as after many admissions: (cells int64, pages int32)."""
        if len(updates) <= self._num_updates:
            return None
        rest = list(updates.items())[self._num_updates :]
        cells = torch.tensor([cell for cell, _ in rest])
        pages = torch.tensor([page for _, page in rest], dtype=torch.int32)
        return (cells.pin_memory(), pages.pin_memory()) if self.device.type == "cuda" else (cells, pages)

    @torch.inference_mode(False)
    def _make_staging(self) -> Staging:
        words = torch.zeros(self._num_words, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        staging = Staging(words, self._make_event())
        staging.num_seqs = self.max_batch  # nothing of it is padding yet
        return staging


class StagedStep:
    """A step that is built, and not on the device before `upload`."""

    def __init__(
        self,
        buffers: DecodeBuffers,
        staging: Staging,
        updates: dict[int, int],
        overflow: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.buffers, self.staging, self.updates, self.overflow = buffers, staging, updates, overflow
        self._uploaded = False

    def upload(self) -> None:
        """Fill the buffers, once."""
        if not self._uploaded:
            self._uploaded = True
            self.buffers.upload(self)
