"""What transformers 5.17 and 5.23 name or do differently in continuous batching."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.generation.configuration_utils import ContinuousBatchingConfig


def page_size_option() -> str:
    """The field of `ContinuousBatchingConfig` for tokens a page."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    return "page_size" if "page_size" in known else "block_size"


def forget_prefixes(cache: Any) -> None:
    """Free the pages of a manager's cache, also those that it keeps for prefix hits."""
    if hasattr(cache, "cache_allocators"):
        cache.free_all_requests(clear_ledgers=True)
    else:
        cache.free_all_requests()
        cache._block_manager.has_enough_free_blocks(cache.num_blocks)  # 5.17 clears kept blocks to satisfy this
