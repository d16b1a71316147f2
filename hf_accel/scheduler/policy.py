"""The order in which waiting requests are considered. Pure functions over requests; knows nothing of pages or torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hf_accel.request import Request

LPM_QUEUE_LIMIT = 128
"""Longest-prefix-match sorts at most so many waiting requests a step (SGLang falls back to fcfs past it)."""


def order_waiting(policy: str, waiting: Iterable[Request], cached_tokens: Callable[[Request], int]) -> list[Request]:
    """The waiting requests in the order `policy` admits them.

    Args:
        policy: "fcfs" by arrival, "priority" by `Request.priority` (smaller first) then arrival, "lpm" by the longest
            cached prefix first (Theorem 3.1 of arXiv 2312.07104), then arrival.
        waiting: the queue, in arrival order with retracted requests in front.
        cached_tokens: how many tokens of a request the prefix tree would serve now.
    """
    queue = list(waiting)
    if policy == "priority":
        return sorted(queue, key=lambda request: (request.priority, request.arrival))
    if policy == "lpm" and 1 < len(queue) <= LPM_QUEUE_LIMIT:
        return sorted(queue, key=lambda request: (-cached_tokens(request), request.arrival))
    return queue
