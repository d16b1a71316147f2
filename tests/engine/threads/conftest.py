"""A patched model that many callers share, and a record of who shared a step."""

from __future__ import annotations

import time

import pytest

import hf_accel

from .callers import CONFIG


@pytest.fixture(params=[{}, {"fused": False, "overlap": True}], ids=["fused", "own-layers-overlap"])
def model(tiny_llama, request):
    hf_accel.patch(tiny_llama, **request.param, **CONFIG)
    yield tiny_llama
    hf_accel.unpatch(tiny_llama)


@pytest.fixture
def batch_sizes(model, monkeypatch):
    """Requests in each step; steps are slowed down a little so that callers meet."""
    runner, sizes = hf_accel.get_engine(model).core.executor.runner, []
    forward = runner.forward

    def recording(batch):
        sizes.append(len(batch.query_lens_cpu))
        time.sleep(0.001)
        return forward(batch)

    monkeypatch.setattr(runner, "forward", recording)
    return sizes
