"""A patched model that many callers share, and a record of who shared a step."""

from __future__ import annotations

import time

import pytest

import hf_accel

from .callers import CONFIG


@pytest.fixture(params=[True, False], ids=["fused", "own-layers"])
def model(tiny_llama, request):
    hf_accel.patch(tiny_llama, fused=request.param, **CONFIG)
    yield tiny_llama
    hf_accel.unpatch(tiny_llama)


@pytest.fixture
def batch_sizes(model, monkeypatch):
    """Requests in each step; steps are slowed down a little so that callers meet."""
    executor, sizes = hf_accel.get_engine(model).core.executor, []
    execute = executor.execute

    def recording(batch, requests):
        sizes.append(len(requests))
        time.sleep(0.001)
        return execute(batch, requests)

    monkeypatch.setattr(executor, "execute", recording)
    return sizes
