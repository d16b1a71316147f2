"""How absorbed latent attention shares a batch among programs, computed by every program for itself from the lengths on the device.

An item is a part of the keys of one sequence for one block of its query tokens. Parts are as nearly as possible of one ideal
length, the batch's work over the programs that run at a time, whatever the lengths are. Items are numbered by sequence, block of
tokens, part.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _parts_of(length, ideal):
    """Parts that a sequence's keys are split into: the nearest whole number of ideal ones, at least one."""
    return tl.maximum((length + ideal // 2) // ideal, 1)


@triton.jit
def _lengths(seqs, seq_lens_ptr, starts_ptr, num_seqs, TOKENS: tl.constexpr):
    """Blocks of query tokens and context lengths of some sequences; 0 beyond the last."""
    known = seqs < num_seqs
    start = tl.load(starts_ptr + seqs, mask=known, other=0)
    stop = tl.load(starts_ptr + seqs + 1, mask=known, other=0)
    return (stop - start + TOKENS - 1) // TOKENS, tl.load(seq_lens_ptr + seqs, mask=known, other=0)


@triton.jit
def find_item(item, seq_lens_ptr, starts_ptr, num_seqs, capacity, TOKENS, MIN_PART, SEQS: tl.constexpr):
    """(sequence of an item, its first item, items in several parts before it, ideal keys of a part).

    The sequence is num_seqs where there is no such item; there are at most capacity + blocks of query tokens of them.
    """
    total = tl.zeros([], tl.int64)
    for first in range(0, num_seqs, SEQS):
        blocks, length = _lengths(first + tl.arange(0, SEQS), seq_lens_ptr, starts_ptr, num_seqs, TOKENS)
        total += tl.sum(blocks.to(tl.int64) * length)
    ideal = tl.maximum((total + capacity - 1) // capacity, MIN_PART).to(tl.int32)
    seq, first_item, parted, seen = 0, 0, 0, 0
    for first in range(0, num_seqs, SEQS):
        seqs = first + tl.arange(0, SEQS)
        blocks, length = _lengths(seqs, seq_lens_ptr, starts_ptr, num_seqs, TOKENS)
        parts = _parts_of(length, ideal)
        items = blocks * parts
        ends = seen + tl.cumsum(items, 0)
        before = (ends <= item) & (seqs < num_seqs)
        seq += tl.sum(before.to(tl.int32))
        first_item = tl.maximum(first_item, tl.max(tl.where(before, ends, 0)))
        parted += tl.sum(tl.where(before & (parts > 1), items, 0))
        seen += tl.sum(items)
    return seq, first_item, parted, ideal


@triton.jit
def place(item, seq, ideal, seq_lens_ptr, starts_ptr, TOKENS: tl.constexpr):
    """(first token, query length, context length, parts, part, first query) of a sequence's item."""
    start, seq_len = tl.load(starts_ptr + seq), tl.load(seq_lens_ptr + seq)
    num_parts = _parts_of(seq_len, ideal)
    return (
        start,
        tl.load(starts_ptr + seq + 1) - start,
        seq_len,
        num_parts,
        item % num_parts,
        item // num_parts * TOKENS,
    )
