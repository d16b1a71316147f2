"""NaN in a model: `generate` does what HF does with it, the engine says which request it was, and no later call suffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_accel
from hf_accel import Engine, SamplingParams, UnsupportedModelError
from hf_accel.engine.sampled import InvalidLogits

from ..cpp_ops import needs_cpp_ops
from ..patching.configs import left_padded, make_model
from . import generate_cases as cases
from .comparison import CONFIG, assert_same, ids, observe

NAN = float("nan")
REASON = "the model produced NaN or infinite logits"
GREEDY = SamplingParams(temperature=0, max_tokens=6)
GOOD = [5, 6, 7, 8, 9]
BAD = 251  # a token that no prompt of these tests has by chance


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """A patched model that gets NaN after it was patched, as in training: `request.param` is the family and the change."""
    family, change = request.param
    model = make_model(family)
    with hf_accel.patch(model, **CONFIG), torch.no_grad():
        hf_accel.get_engine(model)
        change(model)
        yield model


def _set(name: str, index: Any, value: float = NAN) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        model.get_parameter(name)[index] = value

    return change


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "one_logit": (_set("lm_head.weight", 77), REASON),
    "two_logits": (_set("lm_head.weight", [200, 77]), REASON),
    "infinite_head": (_set("lm_head.weight", 5, float("inf")), REASON),
    "layer": (_set("model.layers.1.mlp.down_proj.weight", (3, 3)), REASON),
    "norm": (_set("model.norm.weight", 3), REASON),
    "token": (_set("model.embed_tokens.weight", BAD), REASON),
    "padding": (_set("model.embed_tokens.weight", 0), "a masked token whose embedding is NaN or infinite"),
}
BROKEN = pytest.mark.parametrize(
    ("broken", "reason"),
    [((family, change), reason) for family in ("llama", "gemma2") for change, reason in CHANGES.values()],
    ids=[f"{family}-{name}" for family in ("llama", "gemma2") for name in CHANGES],
    indirect=["broken"],
)


def _prompts() -> dict[str, torch.Tensor]:
    input_ids, mask = left_padded(cases.LENGTHS_OF_PROMPTS)
    input_ids[1, 9] = BAD
    return {"input_ids": input_ids, "attention_mask": mask}


@BROKEN
@pytest.mark.parametrize(
    "case",
    [
        cases.greedy(),
        cases.greedy(return_dict_in_generate=True, output_scores=True),
        cases.greedy(repetition_penalty=1.2),
        cases.sampled(),
    ],
    ids=["greedy", "dict", "processor", "sampled"],
)
def test_generate_does_what_hf_does(broken: PreTrainedModel, reason: str, case: cases.Case) -> None:
    """The same tokens (argmax takes the first NaN for the highest), or torch's own error where NaN is drawn from."""

    def call() -> Any:
        result = broken.generate(**_prompts(), **case())
        return result if isinstance(result, torch.Tensor) else result.sequences

    engine = hf_accel.get_engine(broken)
    got = [observe(call), observe(call)]
    assert engine.stats().fallback_reasons == {reason: 2}
    engine.check_integrity()
    hf_accel.unpatch(broken)
    expected = observe(call)
    for outcome in got:
        assert_same(outcome, expected)


@pytest.mark.parametrize("broken", [("llama", CHANGES["padding"][0])], indirect=True)
def test_padding_that_is_not_there_is_no_reason(broken: PreTrainedModel) -> None:
    got = broken.generate(ids(), **cases.greedy()())
    mixed = broken.generate(**{k: v[1:2] for k, v in _prompts().items()}, **cases.greedy()())
    assert hf_accel.get_engine(broken).stats().fallback_reasons == {}
    hf_accel.unpatch(broken)
    assert torch.equal(got, broken.generate(ids(), **cases.greedy()()))
    assert torch.equal(mixed, broken.generate(**{k: v[1:2] for k, v in _prompts().items()}, **cases.greedy()()))


@pytest.mark.parametrize("fused", [True, False])
def test_engine_names_the_request(tiny_llama, assert_idle, fused):
    engine = Engine(tiny_llama, fused=fused, **CONFIG)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[200] = NAN  # spoils the prompts that hold this token
    outputs = engine.generate([GOOD, [5, 200, 7], [9, 8]], GREEDY)
    assert [o.error is None for o in outputs] == [True, False, True]
    assert isinstance(outputs[1].error, ValueError)
    assert "NaN logits" in str(outputs[1].error)
    sampled = engine.generate([[5, 200, 7], GOOD], SamplingParams(max_tokens=3, seed=1))
    assert [o.error is None for o in sampled] == [False, True]
    assert_idle(engine)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[200] = 0.1
    assert engine.generate([[5, 200, 7]], GREEDY)[0].error is None  # and its KV was not kept


@pytest.mark.parametrize("how", ["engine", "greedy", "lockstep", "score"])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpp_ops), "torch"])
def test_a_spoilt_prefix_is_not_shared(tiny_llama, backend, how):
    """A chunk that ends in a NaN token leaves NaN in the KV of the tokens before it; other prompts begin with these too."""
    prefix = torch.randint(5, 200, (16,)).tolist()
    bad, good = [*prefix, BAD, *range(2, 10)], [*prefix, 9, 10, 11]
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[BAD] = NAN
    expected = tiny_llama.generate(torch.tensor([good]), do_sample=False, max_new_tokens=6)[0, len(good) :].tolist()
    hf_accel.patch(tiny_llama, **{**CONFIG, "max_num_batched_tokens": 18}, attention_backend=backend)
    engine = hf_accel.get_engine(tiny_llama)
    if how == "engine":
        assert isinstance(engine.generate([bad], GREEDY)[0].error, InvalidLogits)
    elif how == "score":
        assert math.isnan(engine.score(bad, [[7]])[0].total)
    else:
        tiny_llama.generate(
            torch.tensor([bad]), do_sample=False, max_new_tokens=3, return_dict_in_generate=how == "lockstep"
        )
    assert engine.generate([good], GREEDY)[0].outputs[0].token_ids == expected
    hits = engine.stats().num_cached_tokens
    assert engine.generate([good], GREEDY)[0].outputs[0].token_ids == expected
    assert engine.stats().num_cached_tokens > hits  # what is whole is shared as ever
    hf_accel.unpatch(tiny_llama)


def test_a_processor_that_allows_nothing_costs_no_prefix(tiny_llama):
    engine = Engine(tiny_llama, **CONFIG)
    nothing = SamplingParams(max_tokens=1, logits_processors=[lambda token_ids, scores: scores - torch.inf])
    engine.generate([GOOD], GREEDY)
    for _ in range(2):
        assert "let at least one token through" in str(engine.generate([GOOD], nothing)[0].error)
    assert engine.generate([GOOD], GREEDY)[0].num_cached_tokens == 4


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_model_without_finite_logits_is_not_patched(tiny_llama, value):
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] = value
        tiny_llama.lm_head.weight.abs_()
    with pytest.raises(UnsupportedModelError, match="logits are NaN or infinite: look for NaN in its weights"):
        hf_accel.patch(tiny_llama)


def test_a_model_with_one_nan_logit_is_patched(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight[9] = NAN
    expected = tiny_llama.generate(torch.tensor([GOOD]), do_sample=False, max_new_tokens=3)
    with hf_accel.patch(tiny_llama, **CONFIG):
        assert torch.equal(tiny_llama.generate(torch.tensor([GOOD]), do_sample=False, max_new_tokens=3), expected)
