"""Engines whose graphs are recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_accel.config import FaultInjection
from hf_accel.engine import graph_setup, model_runner

from .recording import RecordingMaker, TableBackend

CONFIG: dict[str, Any] = {
    "cuda_graphs": True,
    "fused": False,
    "pack_weights": False,
    "page_size": 4,
    "num_pages": 96,
    "max_num_seqs": 7,
    "faults": FaultInjection(check_integrity=True),
}


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """From now on engines attend by `TableBackend` and replay recordings, from the first step on; returns a configuration."""
    monkeypatch.setattr(model_runner, "select_backend", lambda *_: TableBackend())
    monkeypatch.setattr(graph_setup, "make_maker", lambda _: RecordingMaker())
    monkeypatch.setattr(graph_setup, "PATIENCE", 0)
    return {**CONFIG, "overlap": request.param}


@pytest.fixture
def graphs_of() -> Callable[[Any], Any]:
    """The CudaGraphRunner of an engine."""
    return lambda engine: engine.core.executor.runner.graphs
