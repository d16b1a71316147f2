"""`past_key_values` of a patched `generate`: it is HF's cache in all that can be seen, and goes on as HF's does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import hf_accel
from hf_accel.engine import generate

from ..patching.configs import make_model
from . import generate_cases as cases
from .comparison import CONFIG, TOLERANCE, assert_same_cache, compare, ids, prompts

FAMILIES = (
    "llama",
    "gpt_oss",
    "gemma2",
    "mistral",
)  # full attention, two kinds of layers with and without sinks, sliding
LONG = cases.greedy(return_dict_in_generate=True, max_new_tokens=20)
ENDED = cases.greedy(return_dict_in_generate=True, eos_token_id=cases.EOS)


def _holes() -> dict[str, torch.Tensor]:
    inputs = prompts()
    inputs["attention_mask"][1, 3:6] = 0
    inputs["attention_mask"][2, -3] = 0
    return inputs


def _pair(model: PreTrainedModel, inputs: dict[str, Any], case: cases.Case) -> tuple[Any, Any]:
    """The dicts of the same call, patched and plain."""
    expected = model.generate(**inputs, **case())
    with hf_accel.patch(model, **CONFIG):
        got = model.generate(**inputs, **case())
        assert hf_accel.get_engine(model).stats().fallback_reasons == {}
    assert torch.equal(got.sequences, expected.sequences)
    return got, expected


def _assert_goes_on(model: PreTrainedModel, got: Any, expected: Any, mask: torch.Tensor) -> None:
    """A forward and a `generate` of HF's own, from either cache, under the call's own mask."""
    tokens = torch.cat([expected.sequences, ids(3).repeat(len(mask), 1)], dim=1)
    full = torch.ones_like(tokens)
    full[:, : mask.shape[1]] = mask
    position_ids = (full.cumsum(dim=-1) - 1).clamp(min=0)[:, -4:]

    def logits(cache: DynamicCache) -> torch.Tensor:
        options = {"attention_mask": full, "position_ids": position_ids, "past_key_values": copy.deepcopy(cache)}
        with torch.no_grad():
            return model(input_ids=tokens[:, -4:], **options).logits

    def generated(cache: DynamicCache) -> torch.Tensor:
        options = {"attention_mask": full, "past_key_values": copy.deepcopy(cache)}
        return model.generate(tokens, **options, **cases.greedy(max_new_tokens=20)())

    torch.testing.assert_close(
        logits(got.past_key_values), logits(expected.past_key_values), atol=5 * TOLERANCE, rtol=0
    )
    assert torch.equal(generated(got.past_key_values), generated(expected.past_key_values))


@pytest.mark.parametrize("case", [LONG, ENDED], ids=["long", "ended"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows(family: str, case: cases.Case) -> None:
    model = make_model(family)
    got, expected = _pair(model, prompts(), case)
    mask = prompts()["attention_mask"]
    assert_same_cache(got.past_key_values, expected.past_key_values, mask)
    for mine, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers):
        assert mine.keys.untyped_storage().nbytes() <= theirs.keys.untyped_storage().nbytes()
    _assert_goes_on(model, got, expected, mask)


@pytest.mark.parametrize("make", [_holes, lambda: {"input_ids": ids()}], ids=["holes", "no_mask"])
def test_other_masks(make: Callable[[], dict[str, torch.Tensor]]) -> None:
    """A token that a hole hides has its place in HF's cache too."""
    model, inputs = make_model("llama"), make()
    got, expected = _pair(model, inputs, LONG)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    assert_same_cache(got.past_key_values, expected.past_key_values, mask)
    _assert_goes_on(model, got, expected, mask)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16(family: str) -> None:
    model = make_model(family, torch.bfloat16)
    case = cases.greedy(return_dict_in_generate=True, max_new_tokens=1)
    got, expected = _pair(model, prompts(), case)
    assert_same_cache(got.past_key_values, expected.past_key_values, prompts()["attention_mask"])


@pytest.mark.parametrize(
    ("family", "make"), [("llama", prompts), ("gemma2", prompts), ("llama", _holes)], ids=["llama", "gemma2", "holes"]
)
def test_rows_that_lost_their_pages_are_computed_anew(
    family: str, make: Callable[[], dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another thread's call takes the pages after the last token."""
    model, inputs = make_model(family), make()
    export = generate.export_kv

    def retract_first(engine: hf_accel.Engine, model: PreTrainedModel, rows: list[Any], *args: Any) -> None:
        with engine.core.exclusive():
            engine.core.scheduler._retract(rows[1], None)
        export(engine, model, rows, *args)

    monkeypatch.setattr(generate, "export_kv", retract_first)
    got, expected = _pair(model, inputs, LONG)
    _assert_goes_on(model, got, expected, inputs["attention_mask"])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chat_on_a_patched_model(family: str) -> None:
    """The cache of a patched call, in which rows ended early, goes back into one."""
    model = make_model(family)

    def chat() -> torch.Tensor:
        first = model.generate(**prompts(), **ENDED())
        tokens = torch.cat([first.sequences, ids(3).repeat(3, 1)], dim=1)
        mask = torch.ones_like(tokens)
        mask[:, : prompts()["attention_mask"].shape[1]] = prompts()["attention_mask"]
        return model.generate(tokens, attention_mask=mask, past_key_values=first.past_key_values, **cases.greedy()())

    compare(model, chat, "past_key_values given by the caller")
