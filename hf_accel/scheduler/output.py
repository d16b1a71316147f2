"""The message from policy to mechanism: what one step computes. Frozen, plain ints."""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN_TOKEN = -1
"""Stands for a token that a launched step is sampling: the device reads it from its token table."""


@dataclass(frozen=True)
class ScheduledRequest:
    """One request's share of a step.

    Attributes:
        request_id: whose.
        slot: its row in the page table, [0, max_num_seqs).
        token_ids: tokens to compute now; `UNKNOWN_TOKEN` for one that is being sampled (it then stands alone).
        start: position of the first of them.
        page_updates: (index, page id) pairs to write in the row's page table before the step.
        num_logits: how many of the last tokens need logits (0: a prefill chunk that does not reach the end).
        at_end: the step reaches the end of what is known of the request, so that its next tokens follow.
        admission: the request's at this step: its later ones know another page table and slot.
        num_drafted: how many of the tokens, the last ones, are guesses of what the step is to sample.
    """

    request_id: int
    slot: int
    token_ids: tuple[int, ...]
    start: int
    page_updates: tuple[tuple[int, int], ...]
    num_logits: int
    at_end: bool = False
    admission: int = 0
    num_drafted: int = 0


@dataclass(frozen=True)
class SchedulerOutput:
    """One step.

    Attributes:
        requests: in batch order.
        num_tokens: tokens in the step, over all requests.
        retracted: ids sent back to the waiting queue because pages ran out.
        failed: ids of requests that can never fit; their error is on the request.
        page_copies: (source, destination) pages to copy in all layers, one after the other, once, before the forward;
            also when no request is left in the step.
    """

    requests: tuple[ScheduledRequest, ...]
    num_tokens: int
    retracted: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    page_copies: tuple[tuple[int, int], ...] = ()
