"""AcceleratedPipeline against transformers' own pipeline on the shipped model: same inputs, same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextGenerationPipeline,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

import hf_accel
from hf_accel.demo.model import shipped_model
from hf_accel.pipeline import AcceleratedPipeline

from .prompts import CHAT, GREEDY, OTHER_CHAT, PROMPTS, load


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_full_text": False},
        {"return_tensors": True},
        {"skip_special_tokens": False},
        {"num_beams": 2, "num_return_sequences": 2},
        {"max_length": 24, "max_new_tokens": None},
        {"min_length": 20, "eos_token_id": [1, 221]},
        {"eos_token_id": [1, 221]},
        {"eos_token_id": [1, 221], "pad_token_id": 221, "return_tensors": True},
        {"stop_sequence": "e"},
        {"stop_sequence": "e", "pad_token_id": 1, "return_tensors": True},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"prefix": "Python. "},
        {
            "generation_config": GenerationConfig(max_new_tokens=5, do_sample=False),
            "max_new_tokens": None,
            "do_sample": None,
        },
        {"add_special_tokens": False},
        {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 4}},
        {"handle_long_generation": "hole"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_lists_equal_transformers(plain, ours, options):
    given = {k: v for k, v in {**GREEDY, **options}.items() if v is not None}
    expected = plain(list(PROMPTS), **copy.deepcopy(given))
    assert ours(list(PROMPTS), **copy.deepcopy(given)) == expected


@pytest.mark.parametrize(
    "inputs",
    [PROMPTS[0], [PROMPTS[0]], CHAT, OTHER_CHAT, [CHAT, OTHER_CHAT], (PROMPTS[0],)],
    ids=["str", "list of one", "chat", "chat to continue", "chats", "tuple"],
)
@pytest.mark.parametrize("return_full_text", [True, False])
def test_input_forms_equal_transformers(plain, ours, inputs, return_full_text):
    try:
        expected = plain(copy.deepcopy(inputs), return_full_text=return_full_text, **GREEDY)
    except Exception as error:
        with pytest.raises(type(error)):
            ours(copy.deepcopy(inputs), return_full_text=return_full_text, **GREEDY)
        return
    assert ours(copy.deepcopy(inputs), return_full_text=return_full_text, **GREEDY) == expected


def test_scores_come_with_each_prompt(plain, ours):
    options = {**GREEDY, "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    for got, expected in zip(ours(PROMPTS[:3], **options), plain(PROMPTS[:3], **options), strict=True):
        assert [set(record) for record in got] == [set(record) for record in expected]
        assert got[0]["generated_text"] == expected[0]["generated_text"]
        torch.testing.assert_close(
            torch.tensor(got[0]["scores"]), torch.tensor(expected[0]["scores"]), rtol=1e-4, atol=1e-4
        )


def test_empty_prompt_goes_alone(plain, ours, calls):
    prompts = ["", "The", "", "A list is"]
    options = {**GREEDY, "add_special_tokens": False}
    assert ours(prompts, **options) == plain(prompts, **options)
    assert sorted(calls, key=str) == [(2, 3), None, None]


def test_generators_and_datasets_stream_in_order(plain, ours):
    class Prompts(Dataset):
        def __len__(self):
            return len(PROMPTS)

        def __getitem__(self, index):
            return {"text": PROMPTS[index]}

    expected = plain(list(PROMPTS), **GREEDY)
    assert list(ours((p for p in PROMPTS), batch_size=4, **GREEDY)) == expected
    dataset = ours(KeyDataset(Prompts(), "text"), **GREEDY)
    assert len(dataset) == len(PROMPTS)
    assert list(dataset) == expected
    assert list(dataset) == expected  # again from the start
    assert list(ours((c for c in [CHAT, OTHER_CHAT]), **GREEDY)) == list(
        plain((c for c in [CHAT, OTHER_CHAT]), **GREEDY)
    )


def test_generator_is_read_only_a_window_ahead(ours):
    taken = []

    def prompts():
        for prompt in PROMPTS:
            taken.append(prompt)
            yield prompt

    outputs = iter(ours(prompts(), batch_size=3, **GREEDY))
    next(outputs)
    assert len(taken) == 3


def test_a_list_is_one_call(ours, calls):
    ours(list(PROMPTS), **GREEDY)
    assert [shape[0] for shape in calls] == [len(PROMPTS)]


def test_window_is_what_the_engine_runs_at_once(calls, ours):
    hf_accel.patch(ours.model, num_pages=512, max_num_seqs=6)
    try:
        ours(list(PROMPTS), **GREEDY)
        ours(list(PROMPTS), do_sample=True, num_return_sequences=3, max_new_tokens=2)
    finally:
        hf_accel.patch(ours.model, num_pages=512)
    assert [shape[0] for shape in calls] == [6, 4, 2, 2, 2, 2, 2]


def test_max_length_keeps_each_prompts_meaning(plain, ours, calls):
    prompts = ["The", "An object that is a list of strings", "The", "A list is"]
    options = {"do_sample": False, "max_length": 12}
    assert ours(prompts, **options) == plain(prompts, **options)
    assert sorted(shape[0] for shape in calls) == [1, 1, 2]


def test_processor_of_the_caller_sees_one_prompt_at_a_time(plain, ours, calls):
    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert input_ids.shape[0] == 1
            scores = scores.clone()
            scores[:, input_ids[0, 1]] = -torch.inf
            return scores

    options = {**GREEDY, "logits_processor": LogitsProcessorList([Ban()])}
    assert ours(PROMPTS[:3], **options) == plain(PROMPTS[:3], **options)
    assert [shape[0] for shape in calls] == [1, 1, 1]


def test_no_pad_token_still_batches(plain, ours, calls, monkeypatch):
    expected = plain(list(PROMPTS), **GREEDY)
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    tokenizer.pad_token = None
    monkeypatch.setattr(ours.model.generation_config, "pad_token_id", None)
    pipe = AcceleratedPipeline(ours.model, tokenizer)
    assert pipe(list(PROMPTS), **GREEDY) == expected
    assert calls[0][0] == len(PROMPTS)


def test_several_sequences_and_sampling(ours):
    torch.manual_seed(0)
    outputs = ours(PROMPTS[:4], do_sample=True, temperature=0.9, num_return_sequences=3, max_new_tokens=6)
    assert [len(o) for o in outputs] == [3] * 4
    assert all(r["generated_text"].startswith(p) for p, o in zip(PROMPTS[:4], outputs, strict=True) for r in o)
    assert len({r["generated_text"] for r in outputs[1]}) > 1
    torch.manual_seed(0)
    assert ours(PROMPTS[:4], do_sample=True, temperature=0.9, num_return_sequences=3, max_new_tokens=6) == outputs


def test_batch_size_one_gives_transformers_draws(plain, ours):
    options = {"do_sample": True, "max_new_tokens": 6}
    torch.manual_seed(3)
    expected = plain(PROMPTS[:3], **options)
    torch.manual_seed(3)
    assert ours(PROMPTS[:3], batch_size=1, **options) == expected


def test_progress_bar(ours, capsys):
    ours(list(PROMPTS), progress=True, **GREEDY)
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err
    ours(list(PROMPTS), **GREEDY)  # not a terminal
    ours(list(PROMPTS), progress=False, **GREEDY)
    assert "prompt" not in capsys.readouterr().err


def test_constructors(ours):
    assert isinstance(ours, TextGenerationPipeline)
    model, tokenizer = load()
    by_factory = pipeline("text-generation", model=model, tokenizer=tokenizer, pipeline_class=AcceleratedPipeline)
    assert isinstance(by_factory, AcceleratedPipeline)
    assert hf_accel.is_patched(model)
    engine = hf_accel.get_engine(model)
    by_object = AcceleratedPipeline(model=model)  # finds its tokenizer, keeps the engine
    assert hf_accel.get_engine(model) is engine
    assert by_object(PROMPTS[0], **GREEDY) == by_factory(PROMPTS[0], **GREEDY)
    hf_accel.unpatch(model)
    assert by_object(PROMPTS[:2], **GREEDY) == ours(PROMPTS[:2], **GREEDY)  # without the engine: HF's own way


def test_constructor_errors():
    model, tokenizer = load()
    model.name_or_path = ""
    with pytest.raises(ValueError, match="tokenizer="):
        AcceleratedPipeline(model=model)
    with pytest.raises(ValueError, match="page_sise"):
        AcceleratedPipeline(model, tokenizer, engine_config={"page_sise": 8})
