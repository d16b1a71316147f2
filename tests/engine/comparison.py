"""Compares one call on a model as it is and patched: its result, errors, warnings, log lines and the random state it leaves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as hf_logging

import hf_accel
from hf_accel.config import FaultInjection

from ..patching.configs import left_padded
from . import generate_cases as cases

CONFIG: dict[str, Any] = {
    "page_size": 4,
    "num_pages": 128,
    "max_num_batched_tokens": 16,
    "faults": FaultInjection(check_integrity=True),
}
TOLERANCE = 2e-4  # of logits of magnitude 5, and of keys and values


@dataclass
class Outcome:
    """All that a caller can observe of a call."""

    result: Any = None
    error: BaseException | None = None
    warnings: list[tuple[type, str]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    random_state: torch.Tensor | None = None


def observe(call: Callable[[], Any]) -> Outcome:
    """Make a call from a fixed seed and note everything about it."""
    outcome = Outcome()
    hf_logging.warning_once.cache_clear()
    handler = logging.Handler()
    handler.emit = lambda record: outcome.logs.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    torch.manual_seed(123)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                outcome.result = call()
            except Exception as error:
                outcome.error = error
        outcome.warnings = [(w.category, str(w.message)) for w in caught]
    finally:
        logger.removeHandler(handler)
    outcome.random_state = torch.get_rng_state()
    return outcome


def assert_same(got: Outcome, expected: Outcome) -> None:
    if expected.error is not None or got.error is not None:
        assert type(got.error) is type(expected.error), f"{got.error!r} instead of {expected.error!r}"
        assert str(got.error) == str(expected.error)
    assert got.warnings == expected.warnings
    assert got.logs == expected.logs
    assert_same_result(got.result, expected.result)
    if expected.error is None:
        assert torch.equal(got.random_state, expected.random_state), "the global random state went another way"


def assert_same_result(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    elif expected is not None:
        assert list(got.keys()) == list(expected.keys())
        assert torch.equal(got.sequences, expected.sequences)
        for name in ("scores", "logits"):
            mine, theirs = getattr(got, name), getattr(expected, name)
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                assert type(mine) is tuple and len(mine) == len(theirs)
                torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=TOLERANCE, rtol=0)
        assert type(got.past_key_values) is type(expected.past_key_values)


def assert_same_cache(got: DynamicCache, expected: DynamicCache, mask: torch.Tensor) -> None:
    """All that the layers say of themselves, and the values at every token but padding, where ours are zeros.

    Args:
        got, expected: caches that patched and plain `generate` returned.
        mask: [batch, prompt length] of the call, bool or int.
    """
    assert type(got) is type(expected) and len(got.layers) == len(expected.layers)
    for index, (mine, theirs) in enumerate(zip(got.layers, expected.layers)):
        length = expected.get_seq_length(index)
        assert got.get_seq_length(index) == length and mine.is_initialized
        assert got.get_mask_sizes(3, index) == expected.get_mask_sizes(3, index)
        assert type(mine) is type(theirs) and vars(mine).keys() == vars(theirs).keys()
        plain = [
            {k: v for k, v in vars(x).items() if isinstance(v, (bool, int, torch.dtype, torch.device))}
            for x in (mine, theirs)
        ]
        assert plain[0] == plain[1]
        real = torch.ones(mask.shape[0], length, dtype=torch.bool)
        real[:, : mask.shape[1]] = mask.bool()
        for name in ("keys", "values"):
            ours, hfs = getattr(mine, name), getattr(theirs, name)
            assert (ours.shape, ours.dtype, ours.device) == (hfs.shape, hfs.dtype, hfs.device)
            kept = real[:, length - ours.shape[2] :]  # [batch, tokens]
            tolerance = TOLERANCE if ours.dtype is torch.float32 else 0.1
            torch.testing.assert_close(ours.transpose(1, 2)[kept], hfs.transpose(1, 2)[kept], atol=tolerance, rtol=0)
            assert not ours.transpose(1, 2)[~kept].any()


def prompts() -> dict[str, torch.Tensor]:
    input_ids, mask = left_padded(cases.LENGTHS_OF_PROMPTS)
    return {"input_ids": input_ids, "attention_mask": mask}


def compare(model: PreTrainedModel, call: Callable[[], Any], reason: str | None = None, count: int = 2) -> Outcome:
    """The call on the model as it is, then twice patched (the second time on a warm prefix cache); returns HF's outcome."""
    expected = observe(call)
    with hf_accel.patch(model, **CONFIG):
        for _ in range(2):
            got = observe(call)
            assert_same(got, expected)
        stats = hf_accel.get_engine(model).stats()
        hf_accel.get_engine(model).check_integrity()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_pages_free + stats.num_pages_cached == stats.num_pages_total
        if reason is None:
            assert stats.fallback_reasons == {}
        else:
            assert stats.num_fallbacks == count and len(stats.fallback_reasons) == 1
            assert reason in next(iter(stats.fallback_reasons))
    return expected


def compare_case(model: PreTrainedModel, case: cases.Case, reason: str | None = None) -> Outcome:
    return compare(model, lambda: model.generate(**{**prompts(), **case()}), reason)


def table(entries: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", entries.values(), ids=entries.keys())


def ids(length: int = 11) -> torch.Tensor:
    """One prompt, [1, length]."""
    return left_padded([length], seed=7)[0]
