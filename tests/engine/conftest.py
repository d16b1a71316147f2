"""Fixtures of the engine's tests: a tokenizer of bytes, and the check that nothing leaked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A fast tokenizer whose 256 tokens are the bytes, as `tiny_llama`'s vocabulary has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def assert_idle() -> Callable[[Any], None]:
    """Says that an engine holds nothing: no request, every page free or in the prefix cache, every invariant in order."""

    def check(engine: Any, patience: float = 0.0) -> None:
        deadline = time.monotonic() + patience  # threads that were told to leave may need a moment
        while (stats := engine.stats()).num_running + stats.num_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_pages_free + stats.num_pages_cached == stats.num_pages_total
        assert not engine.core.requests and not engine.core._held_logits
        engine.check_integrity()

    return check
