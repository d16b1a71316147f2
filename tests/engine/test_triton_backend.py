"""The engine on the Triton backend, its kernels interpreted where there is no GPU: greedy tokens are HF's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_accel import Engine, SamplingParams
from hf_accel.attention import select
from hf_accel.attention.triton_backend import TritonBackend
from hf_accel.config import FaultInjection
from hf_accel_kernels import ops
from hf_accel_kernels.triton_ops import paged_attention as kernels

from ..kernels.triton import interpreter
from ..patching.configs import VOCAB_SIZE, make_model

NEW_TOKENS = 3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that the backend takes for one with Triton."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    interpreter.install()
    monkeypatch.setattr(select, "why_not", lambda device: "")
    monkeypatch.setattr(select, "TritonBackend", _Unchecked)
    monkeypatch.setattr(ops, "why_not", lambda device: "")
    return torch.device("cpu")


class _Unchecked(TritonBackend):
    """On a CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(None)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])  # groups, windows and sinks; windows and soft caps
def test_tokens_are_those_of_generate(family: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]).to(device)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (19, 3)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        expected.append(
            model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
        )
    engine = Engine(
        model,
        attention_backend="triton",
        page_size=4,
        num_pages=40,
        max_num_batched_tokens=16,  # chunks of the long prompt beside decode rows
        faults=FaultInjection(check_integrity=True),
    )
    assert isinstance(engine.core.executor.runner.backend, TritonBackend)
    calls = {"decode": 0, "prefill": 0}
    monkeypatch.setattr(kernels, "paged_decode", _counted(kernels.paged_decode, calls, "decode"))
    monkeypatch.setattr(kernels, "paged_prefill", _counted(kernels.paged_prefill, calls, "prefill"))
    outputs = engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0))
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert calls["decode"] >= 2 * (NEW_TOKENS - 1) and calls["prefill"] >= 2 * 2  # two layers; 22 tokens, 16 a step
    engine.shutdown()


def _counted(function: Callable[..., None], calls: dict[str, int], name: str) -> Callable[..., None]:
    def counted(*args: Any, **keywords: Any) -> None:
        calls[name] += 1
        function(*args, **keywords)

    return counted
