"""Engines that run ahead, and one that does not, over a model whose tokens vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_accel import Engine
from hf_accel.config import FaultInjection


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    """Weights large enough for sampling and greedy tokens that vary."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return tiny_llama


@pytest.fixture
def make_engine(model: Any, byte_tokenizer: Any) -> Callable[..., Engine]:
    """An engine with every invariant checked after every step."""

    def make(overlap: bool | str = True, faults: dict[str, Any] | None = None, **options: Any) -> Engine:
        checked = FaultInjection(check_integrity=True, **(faults or {}))
        return Engine(
            model, byte_tokenizer, overlap=overlap, faults=checked, **{"num_pages": 128, "page_size": 4, **options}
        )

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine], assert_idle: Any) -> Iterator[Engine]:
    """One that runs ahead."""
    engine = make_engine()
    yield engine
    assert_idle(engine)
    assert not engine.core._overlapped.in_flight
