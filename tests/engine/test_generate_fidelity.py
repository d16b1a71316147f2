"""Each argument of `generate()` on a patched model gives what HF gives: tokens, dicts, errors, warnings, random state."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.utils import logging as hf_logging

import hf_accel
from hf_accel.config import FaultInjection

from ..patching.configs import left_padded, make_model
from . import generate_cases as cases

CONFIG: dict[str, Any] = {
    "page_size": 4,
    "num_pages": 128,
    "max_num_batched_tokens": 16,
    "faults": FaultInjection(check_integrity=True),
}
TOLERANCE = 2e-4  # of logits of magnitude 5, and of keys and values


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One on the fused path, one on its own layers with sliding windows."""
    return make_model(request.param)


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
    """Shapes everywhere, values at every token but padding."""
    assert got.get_seq_length() == expected.get_seq_length() and len(got.layers) == len(expected.layers)
    for mine, theirs in zip(got.layers, expected.layers):
        assert type(mine) is type(theirs) and mine.keys.shape == theirs.keys.shape
        real = torch.ones(mask.shape[0], expected.get_seq_length(), dtype=torch.bool)
        real[:, : mask.shape[1]] = mask.bool()
        real = real[:, -mine.keys.shape[2] :, None].expand(-1, -1, mine.keys.shape[3])[:, None].expand_as(mine.keys)
        torch.testing.assert_close(mine.keys[real], theirs.keys[real], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(mine.values[real], theirs.values[real], atol=TOLERANCE, rtol=0)


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


@table(cases.LENGTHS | {f"sampled_{k}": v for k, v in cases.SAMPLING.items()} | cases.PROCESSORS)
def test_argument_gives_hfs_tokens(model: PreTrainedModel, case: cases.Case) -> None:
    outcome = compare_case(model, case)
    assert outcome.error is None


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


def ids(length: int = 11) -> torch.Tensor:
    return left_padded([length], seed=7)[0]


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


# ---- caches given by the caller ------------------------------------------------------------------------------------


def test_chat_loop_reusing_a_cache(model: PreTrainedModel) -> None:
    def chat() -> torch.Tensor:
        cache, tokens = DynamicCache(config=model.config), ids()
        for turn in range(3):
            tokens = model.generate(tokens, past_key_values=cache, **cases.greedy()())
            tokens = torch.cat([tokens, ids(3 + turn)], dim=1)
        return tokens

    compare(model, chat, "past_key_values given by the caller", count=6)


def test_returned_cache_goes_on(model: PreTrainedModel) -> None:
    """The cache of a patched call, in which rows ended early, continues as HF's does."""

    def chat() -> torch.Tensor:
        first = model.generate(**prompts(), **cases.greedy(return_dict_in_generate=True, eos_token_id=cases.EOS)())
        tokens = torch.cat([first.sequences, ids(3).repeat(3, 1)], dim=1)
        mask = torch.ones_like(tokens)
        mask[:, : prompts()["attention_mask"].shape[1]] = prompts()["attention_mask"]
        return model.generate(tokens, attention_mask=mask, past_key_values=first.past_key_values, **cases.greedy()())

    compare(model, chat, "past_key_values given by the caller")


def test_prefilled_cache_for_many_prompts(model: PreTrainedModel) -> None:
    with torch.no_grad():
        prefix = model(ids(), past_key_values=DynamicCache(config=model.config)).past_key_values

    def call() -> torch.Tensor:
        tokens = torch.cat([ids(), left_padded([4], seed=9)[0]], dim=1)
        return model.generate(tokens, past_key_values=copy.deepcopy(prefix), **cases.greedy()())

    compare(model, call, "past_key_values given by the caller")


# ---- other models in the call --------------------------------------------------------------------------------------


def test_assisted_decoding(model: PreTrainedModel) -> None:
    """The patched model as the main one and as its own assistant: both keep to HF's code."""
    expected = observe(lambda: model.generate(ids(), assistant_model=model, **cases.greedy()()))
    with hf_accel.patch(model, **CONFIG):
        got = observe(lambda: model.generate(ids(), assistant_model=model, **cases.greedy()()))
        assert set(hf_accel.get_engine(model).stats().fallback_reasons) == {
            "the model is the assistant of another generation"
        }
    assert_same(got, expected)


def test_prompt_lookup(model: PreTrainedModel) -> None:
    compare(model, lambda: model.generate(ids().repeat(1, 2), prompt_lookup_num_tokens=3, **cases.greedy()()))


def test_custom_generate_callable(model: PreTrainedModel) -> None:
    """A caller's own decoding loop is called as by HF."""

    def loop(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("custom_generate", None)
        return torch.cat([input_ids, input_ids], dim=1)

    compare(model, lambda: model.generate(ids(), custom_generate=loop, **cases.greedy()()))


# ---- streamers -----------------------------------------------------------------------------------------------------


class Recorder:
    """Notes what a streamer is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("options", [cases.greedy(eos_token_id=cases.EOS), cases.sampled()], ids=["greedy", "sampled"])
def test_streamer_is_told_what_hf_tells(model: PreTrainedModel, options: cases.Case) -> None:
    told: list[list[Any]] = []

    def call() -> torch.Tensor:
        recorder = Recorder()
        result = model.generate(**prompts(), streamer=recorder, **options())
        told.append(recorder.calls)
        return result

    compare(model, call)
    assert told[0] == told[1] == told[2] and told[0][-1] == "end"


def test_text_streamer(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []

    def call() -> torch.Tensor:
        result = model.generate(
            ids(), streamer=TextStreamer(cases.make_tokenizer(), skip_prompt=True), **cases.greedy()()
        )
        printed.append(capsys.readouterr().out)
        return result

    compare(model, call)
    assert printed[0] == printed[1] == printed[2] and len(printed[0]) > 10


def test_text_iterator_streamer_in_a_thread(model: PreTrainedModel) -> None:
    def call() -> str:
        streamer = TextIteratorStreamer(cases.make_tokenizer(), timeout=60)
        options = {"input_ids": ids(), "streamer": streamer, **cases.greedy()()}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    expected = call()
    with hf_accel.patch(model, **CONFIG):
        assert call() == expected
        assert hf_accel.get_engine(model).stats().fallback_reasons == {}


def test_exception_in_a_streamer(model: PreTrainedModel) -> None:
    """It reaches the caller as it is, `end` is not called, nothing stays behind, and the next call works."""

    class Failing(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.calls) == 4:
                raise LookupError("the client has gone")

    expected = model.generate(**prompts(), **cases.greedy()())
    with hf_accel.patch(model, **CONFIG):
        streamer = Failing()
        with pytest.raises(LookupError, match="the client has gone"):
            model.generate(**prompts(), streamer=streamer, **cases.greedy()())
        assert len(streamer.calls) == 4
        stats = hf_accel.get_engine(model).stats()
        assert stats.num_running == stats.num_waiting == 0
        assert torch.equal(model.generate(**prompts(), **cases.greedy()()), expected)


# ---- what calls leave behind ---------------------------------------------------------------------------------------


def test_user_objects_are_used_in_place(model: PreTrainedModel) -> None:
    """A processor's own state after a call is as after HF's."""

    def calls_made() -> int:
        processor = cases.RisingBias()
        model.generate(**prompts(), logits_processor=LogitsProcessorList([processor]), **cases.greedy()())
        return processor.num_calls

    expected = calls_made()
    with hf_accel.patch(model, **CONFIG):
        assert calls_made() == expected


def test_generation_config_of_the_model(model: PreTrainedModel) -> None:
    """Defaults that live on the model are honoured, and left as they were."""
    model = copy.deepcopy(model)
    model.generation_config.update(do_sample=True, top_k=5, temperature=0.8, max_new_tokens=9, eos_token_id=cases.EOS)
    model.generation_config.pad_token_id = cases.PAD
    before = model.generation_config.to_dict()
    compare(model, lambda: model.generate(**prompts()))
    assert model.generation_config.to_dict() == before


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    yield
    hf_logging.set_verbosity(verbosity)
