"""Each argument of `generate()` on a patched model gives what HF gives: tokens, dicts, errors, warnings, random state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

import hf_accel
from hf_accel_kernels.multinomial import _checked_native

from ..patching.configs import make_model
from . import generate_cases as cases
from .comparison import CONFIG, assert_same, assert_same_cache, compare, compare_case, ids, observe, prompts, table


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One on the fused path, one on its own layers with sliding windows."""
    return make_model(request.param)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    yield
    hf_logging.set_verbosity(verbosity)


@table(cases.LENGTHS | {f"sampled_{k}": v for k, v in cases.SAMPLING.items()} | cases.PROCESSORS)
def test_argument_gives_hfs_tokens(model: PreTrainedModel, case: cases.Case) -> None:
    outcome = compare_case(model, case)
    assert outcome.error is None


def test_sampling_leaves_the_zero_probabilities_out(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens above come from our own op where it is built: torch's is never asked."""
    if _checked_native() is None:
        pytest.skip("the C++ ops are not built here")

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch.multinomial was called")

    with hf_accel.patch(model, **CONFIG):
        monkeypatch.setattr(torch, "multinomial", forbidden)
        model.generate(**prompts(), do_sample=True, top_k=5, max_new_tokens=4, pad_token_id=cases.PAD)


@table(cases.OUTPUTS)
def test_dict_output(model: PreTrainedModel, case: cases.Case) -> None:
    expected = compare_case(model, case).result
    if not isinstance(expected, torch.Tensor):
        with hf_accel.patch(model, **CONFIG):
            got = model.generate(**{**prompts(), **case()})
        assert_same_cache(got.past_key_values, expected.past_key_values, prompts()["attention_mask"])


@table(cases.FALLBACKS)
def test_fallback_gives_hfs_answer_and_is_counted(
    model: PreTrainedModel, case: tuple[str, cases.Case], caplog: pytest.LogCaptureFixture
) -> None:
    reason, make = case
    with caplog.at_level(logging.WARNING, "hf_accel"):
        compare_case(model, make, reason)
    lines = [r.getMessage() for r in caplog.records if r.name == "hf_accel" and "original code" in r.getMessage()]
    assert len(lines) == 1 and reason in lines[0]


@table(cases.ELSEWHERE)
def test_other_methods_are_hfs_own(model: PreTrainedModel, case: cases.Case) -> None:
    compare_case(model, case)


@table(cases.ERRORS)
def test_errors_are_hfs_own(model: PreTrainedModel, case: cases.Case) -> None:
    expected = observe(lambda: model.generate(**{**prompts(), **case()}))
    assert expected.error is not None, "the case is no error"
    with hf_accel.patch(model, **CONFIG):
        assert_same(observe(lambda: model.generate(**{**prompts(), **case()})), expected)
        stats = hf_accel.get_engine(model).stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_pages_free + stats.num_pages_cached == stats.num_pages_total


# ---- inputs --------------------------------------------------------------------------------------------------------


def holes() -> torch.Tensor:
    mask = prompts()["attention_mask"]
    mask[1, 3:6] = 0
    mask[2, -3] = 0
    return mask


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "no_mask": lambda: {"input_ids": ids()},
    "inputs_by_position_name": lambda: {"inputs": ids()},
    "mask_inferred_from_pad": lambda: {"input_ids": prompts()["input_ids"]},
    "pad_is_eos_in_prompt": lambda: {"input_ids": torch.tensor([[5, 6, 0, 7, 8]]), "eos_token_id": 0},
    "bool_mask": lambda: {**prompts(), "attention_mask": prompts()["attention_mask"].bool()},
    "float_mask": lambda: {**prompts(), "attention_mask": prompts()["attention_mask"].float()},
    "all_rows_padded": lambda: {
        "input_ids": torch.nn.functional.pad(prompts()["input_ids"], (5, 0)),
        "attention_mask": torch.nn.functional.pad(prompts()["attention_mask"], (5, 0)),
    },
    "nothing_but_bos": lambda: {"bos_token_id": 1},
    "one_token": lambda: {"input_ids": torch.tensor([[9]])},
    "int32": lambda: {"input_ids": ids().int()},
    "many_equal_rows": lambda: {"input_ids": ids().repeat(5, 1)},
}


@table(INPUTS)
def test_inputs(model: PreTrainedModel, case: Callable[[], dict[str, Any]]) -> None:
    outcome = compare(model, lambda: model.generate(**{**cases.greedy()(), **case()}))
    assert outcome.error is None


HOLES: dict[str, Callable[[], dict[str, Any]]] = {
    "in_the_mask": lambda: {**prompts(), "attention_mask": holes()},
    "inferred_from_pad": lambda: {"input_ids": torch.tensor([[5, 6, 0, 7, 8, 0, 9]])},
}


@table(HOLES)
def test_mask_with_holes(model: PreTrainedModel, case: Callable[[], dict[str, Any]]) -> None:
    """Without windows a masked token might as well not be there; a window counts it, so those models fall back."""
    sliding = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    compare(model, lambda: model.generate(**{**cases.greedy()(), **case()}), "holes" if sliding else None)


def test_right_padding(model: PreTrainedModel) -> None:
    flipped = {name: tensor.flip(1) for name, tensor in prompts().items()}
    compare(model, lambda: model.generate(**flipped, **cases.greedy()()), "hides the last token")


def test_row_without_tokens(model: PreTrainedModel) -> None:
    mask = prompts()["attention_mask"]
    mask[0] = 0
    compare(model, lambda: model.generate(**{**prompts(), "attention_mask": mask}, **cases.greedy()()), "last token")


BAD_INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "one_dimension": lambda: {"input_ids": torch.tensor([5, 6, 7])},
    "list": lambda: {"input_ids": [[5, 6, 7]]},
    "float_ids": lambda: {"input_ids": ids().float()},
    "id_too_large": lambda: {"input_ids": torch.tensor([[5, 256]])},
    "id_negative": lambda: {"input_ids": torch.tensor([[5, -1]])},
    "no_tokens": lambda: {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
    "nothing_and_no_bos": lambda: {},
}


@table(BAD_INPUTS)
def test_bad_inputs_fail_as_in_hf(model: PreTrainedModel, case: Callable[[], dict[str, Any]]) -> None:
    model.generation_config.bos_token_id = None

    def call() -> Any:
        return model.generate(**cases.greedy()(), **case())

    expected = observe(call)
    assert expected.error is not None
    with hf_accel.patch(model, **CONFIG):
        got = observe(call)
        stats = hf_accel.get_engine(model).stats()
    assert type(got.error) is type(expected.error) and str(got.error) == str(expected.error)
    assert stats.num_running == stats.num_waiting == 0
