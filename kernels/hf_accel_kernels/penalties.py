"""What changes single logits before sampling, from counts that stay on the device: the typed contract, its checks, dispatch.

Owns the table of counts: which tokens a sequence has seen, and how often in its output. Knows tensors only: a caller gives
a row of the table to each sequence that needs one, and says when it starts. Two bytes for a token: 256 sequences of a
vocabulary of 128256 are 63 MiB; sequences without penalties need no row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .triton_ops.launch import why_not

IN_PROMPT = -(1 << 15)  # the bit of an entry that says the prompt has the token; the other 15 count it in the output
MOST = (1 << 15) - 1  # where counting stops


def count_table(num_sequences: int, vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """[num_sequences, vocab_size] int16: nothing seen yet."""
    return torch.zeros(num_sequences, vocab_size, dtype=torch.int16, device=device)


def start_counts(table: torch.Tensor, row: int, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
    """Make a row of the table that of a sequence, as it is admitted. No host sync: pinned memory, one copy.

    Args:
        table: [num_sequences, vocab_size] int16; its row is overwritten.
        row: which.
        prompt, output: token ids; those past the vocabulary have no logit and are left out.
    """
    vocab_size = table.shape[1]
    entries = np.zeros(vocab_size, dtype=np.int64)
    seen = np.asarray(output, dtype=np.int64)
    np.add.at(entries, seen[seen < vocab_size], 1)
    entries = entries.clip(max=MOST)
    seen = np.asarray(prompt, dtype=np.int64)
    entries[seen[seen < vocab_size]] |= IN_PROMPT
    host = torch.from_numpy(entries.astype(np.int16))
    if table.device.type == "cuda":
        host = host.pin_memory()
    table[row].copy_(host, non_blocking=True)


def count_tokens(table: torch.Tensor, table_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Count one more output token of each row, where the device has just sampled it. No host sync.

    Args:
        table: [num_sequences, vocab_size] int16, contiguous; written.
        table_rows: [num_rows] int32, the table's row of each, no two the same; negative: not counted.
        token_ids: [num_rows] int64; those outside the vocabulary are not counted.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_table(table, table_rows, token_ids.shape[0])
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64 or not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be contiguous int64 [num_rows], got {token_ids.shape} {token_ids.dtype}")
    if why_not(table.device):
        _count_in_torch(table, table_rows, token_ids)
    else:
        from .triton_ops import penalties

        penalties.count_tokens(table, table_rows, token_ids)


def apply_penalties(
    logits: torch.Tensor,
    table: torch.Tensor,
    table_rows: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Repetition penalty as HuggingFace's, then presence and frequency penalties as OpenAI's, in place. No host sync.

    Args:
        logits: [num_rows, vocab_size] float32, last axis dense; written.
        table: [num_sequences, vocab_size] int16, contiguous.
        table_rows: [num_rows] int32, the table's row of each; negative: left as it is.
        repetition: [num_rows] float32, over prompt and output; 1 is off.
        presence, frequency: [num_rows] float32, over the output; 0 is off.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_logits(logits)
    _check_table(table, table_rows, logits.shape[0])
    if table.shape[1] != logits.shape[1]:
        raise ValueError(f"the table must have {logits.shape[1]} tokens as the logits do, got {table.shape[1]}")
    for name, values in {"repetition": repetition, "presence": presence, "frequency": frequency}.items():
        if values.shape != logits.shape[:1] or values.dtype != torch.float32 or not values.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 [{logits.shape[0]}], got {values.shape} {values.dtype}"
            )
    if why_not(logits.device):
        _penalise_in_torch(logits, table, table_rows, repetition, presence, frequency)
    else:
        from .triton_ops import penalties

        penalties.apply_penalties(logits, table, table_rows, repetition, presence, frequency)


def add_to_logits(logits: torch.Tensor, token_ids: torch.Tensor, values: torch.Tensor) -> None:
    """Add to some logits of each row, in place: logit_bias, or -inf for the tokens that may not be chosen yet. No host sync.

    Args:
        logits: [num_rows, vocab_size] float32, last axis dense; written.
        token_ids: [num_rows, num_ids] int32, contiguous, no token twice in a row; those outside the vocabulary mean nothing.
        values: [num_rows, num_ids] float32, contiguous.

    Raises:
        ValueError: shapes, dtypes or layouts disagree.
    """
    _check_logits(logits)
    if token_ids.ndim != 2 or token_ids.shape[0] != logits.shape[0] or token_ids.dtype != torch.int32:
        got = f"{tuple(token_ids.shape)} {token_ids.dtype}"
        raise ValueError(f"token_ids must be int32 [{logits.shape[0]}, num_ids], got {got}")
    if values.shape != token_ids.shape or values.dtype != torch.float32:
        raise ValueError(f"values must be float32 {tuple(token_ids.shape)}, got {tuple(values.shape)} {values.dtype}")
    if not token_ids.is_contiguous() or not values.is_contiguous():
        raise ValueError("token_ids and values must be contiguous")
    if why_not(logits.device):
        _add_in_torch(logits, token_ids, values)
    else:
        from .triton_ops import penalties

        penalties.add_to_logits(logits, token_ids, values)


def _check_logits(logits: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be float32 [num_rows, vocab_size], dense in the last axis, got {logits.shape} {logits.dtype}"
        )


def _check_table(table: torch.Tensor, table_rows: torch.Tensor, num_rows: int) -> None:
    if table.ndim != 2 or table.dtype != torch.int16 or not table.is_contiguous():
        raise ValueError(
            f"the table must be contiguous int16 [num_sequences, vocab_size], got {table.shape} {table.dtype}"
        )
    if table_rows.shape != (num_rows,) or table_rows.dtype != torch.int32 or not table_rows.is_contiguous():
        raise ValueError(f"table_rows must be contiguous int32 [{num_rows}], got {table_rows.shape} {table_rows.dtype}")


# -- the torch forms --


def _count_in_torch(table: torch.Tensor, table_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    counted = (table_rows >= 0) & (token_ids >= 0) & (token_ids < table.shape[1])
    rows, tokens = table_rows[counted].long(), token_ids[counted]
    entries = table[rows, tokens]
    table[rows, tokens] = torch.where((entries & MOST) < MOST, entries + 1, entries)


def _penalise_in_torch(
    logits: torch.Tensor,
    table: torch.Tensor,
    table_rows: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    entries = torch.where((table_rows >= 0)[:, None], table[table_rows.clamp(min=0).long()], 0)
    penalised = torch.where(logits < 0, logits * repetition[:, None], logits / repetition[:, None])
    penalised = torch.where(entries != 0, penalised, logits)
    num_output = (entries & MOST).float()
    penalised -= frequency[:, None] * num_output + presence[:, None] * (num_output > 0)
    logits.copy_(penalised)


def _add_in_torch(logits: torch.Tensor, token_ids: torch.Tensor, values: torch.Tensor) -> None:
    means = (token_ids >= 0) & (token_ids < logits.shape[1])
    logits.scatter_add_(1, token_ids.where(means, 0).long(), values.where(means, 0.0))
