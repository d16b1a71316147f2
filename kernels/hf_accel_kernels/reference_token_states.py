"""Slow and plain forms of `token_states.py`, one row at a time in Python's integers: what tests compare with."""

from __future__ import annotations

import torch


def mask_rows(states: torch.Tensor, arena_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `token_states.mask_rows`."""
    found = []
    for state in states.tolist():
        if state < 0:
            found.append(-1)
            continue
        count, which = divmod(state, 1 << 32)
        _, _, base, low, low_span, high, high_span = arena_states[which].tolist()
        row = base + min(max(count - low, 0), low_span) + min(max(count - high, 0), high_span)
        found.append(int(rows[row]))
    return torch.tensor(found, dtype=torch.int32)


def advance(
    states: torch.Tensor,
    token_ids: torch.Tensor,
    arena_states: torch.Tensor,
    classes: torch.Tensor,
    moves: torch.Tensor,
) -> torch.Tensor:
    """See `token_states.advance`."""
    after = []
    for state, token_id in zip(states.tolist(), token_ids.tolist(), strict=True):
        if state <= 0:
            after.append(state)
            continue
        count, which = divmod(state, 1 << 32)
        automaton, first = arena_states[which, :2].tolist()
        symbol = int(classes[automaton, min(max(token_id, 0), classes.shape[1] - 1)])
        target, step = moves[first + symbol].tolist()
        added, sets = divmod(step, 2)
        after.append(target + ((0 if sets else count) + added) * (1 << 32))
    return torch.tensor(after, dtype=torch.int64)
