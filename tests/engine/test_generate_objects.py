"""Objects that go in and out of `generate()` on a patched model: caches, other models, streamers, processors with state."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, TextIteratorStreamer, TextStreamer

import hf_accel

from ..patching.configs import left_padded, make_model
from . import generate_cases as cases
from .comparison import CONFIG, assert_same, compare, ids, observe, prompts


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One on the fused path, one on its own layers with sliding windows."""
    return make_model(request.param)


# ---- caches given by the caller ------------------------------------------------------------------------------------


def test_chat_loop_reusing_a_cache(model: PreTrainedModel) -> None:
    def chat() -> torch.Tensor:
        cache, tokens = DynamicCache(config=model.config), ids()
        for turn in range(3):
            tokens = model.generate(tokens, past_key_values=cache, **cases.greedy()())
            tokens = torch.cat([tokens, ids(3 + turn)], dim=1)
        return tokens

    compare(model, chat, "past_key_values given by the caller", count=6)


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
