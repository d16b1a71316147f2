"""Constrained greedy `generate` of a patched model runs in the engine, and answers what the unpatched model answers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import GenerationConfig

import hf_accel
from hf_accel.engine import generate as generate_module
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.logits_processor import (
    ChoiceLogitsProcessor,
    ConstraintLogitsProcessor,
    GrammarLogitsProcessor,
    JSONSchemaLogitsProcessor,
    RegexLogitsProcessor,
)

PATTERN = r"[A-Z][a-zé]{2,5}( [0-9]{1,3})?\."
GRAMMAR = 'start: "[" start "]" | item ("," item)*\nitem: /[a-f]{1,4}/'
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 9}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """Which way each call went."""
    taken: list[str] = []
    for name, way in [("_generate_native", "native"), ("_generate_in_lockstep", "lockstep")]:
        real = getattr(generate_module, name)
        monkeypatch.setattr(generate_module, name, lambda call, real=real, way=way: (taken.append(way), real(call))[1])
    return taken


def batch(rows: int) -> dict:
    """Left-padded prompts of random lengths."""
    ids, mask = torch.randint(10, 200, (rows, 9)), torch.ones(rows, 9, dtype=torch.long)
    for row in range(rows):
        mask[row, : int(torch.randint(0, 7, ()))] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def make_processor(tokenizer, index: int) -> ConstraintLogitsProcessor:
    several = [Constraint.regex(PATTERN), None, Constraint.json_schema(SCHEMA)]
    mixed = [Constraint.grammar(GRAMMAR), Constraint.json_schema(SCHEMA), None]
    if index > 3:
        pytest.importorskip("llguidance")
    return [
        lambda: RegexLogitsProcessor(PATTERN, tokenizer),
        lambda: JSONSchemaLogitsProcessor(SCHEMA, tokenizer),
        lambda: ChoiceLogitsProcessor(["yes", "no", "no more"], tokenizer),
        lambda: ConstraintLogitsProcessor(several, tokenizer),
        lambda: GrammarLogitsProcessor(GRAMMAR, tokenizer),
        lambda: ConstraintLogitsProcessor(mixed, tokenizer),
    ][index]()


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize(
    "options", [{}, {"max_new_tokens": 5}, {"overlap": True}, {"num_pages": 12, "page_size": 8}], ids=str
)
def test_equals_the_unpatched_model(model, tokenizer, ways, index, options):
    options = dict(options)
    calls = {"max_new_tokens": options.pop("max_new_tokens", 40), "do_sample": False}
    inputs, processor = batch(3), make_processor(tokenizer, index)
    expected = model.generate(**inputs, logits_processor=[processor], **calls)
    with hf_accel.patch(model, **options):
        for _ in range(2):  # the second time on cached prefixes, with a used processor
            assert torch.equal(model.generate(**inputs, logits_processor=[processor], **calls), expected)
        assert ways == ["native"] * 2
        fresh = make_processor(tokenizer, index)
        assert torch.equal(model.generate(**inputs, logits_processor=[fresh], **calls), expected)
        hf_accel.get_engine(model).check_integrity()


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, "native"),
        ({"num_return_sequences": 1}, "native"),
        ({"eos_token_id": [1, 33]}, "native"),
        ({"min_new_tokens": 9}, "lockstep"),
        ({"repetition_penalty": 1.4}, "lockstep"),
        ({"return_dict_in_generate": True}, "lockstep"),
        ({"eos_token_id": 33}, "lockstep"),
        ({"eos_token_id": None}, "lockstep"),
    ],
    ids=str,
)
def test_ways(model, tokenizer, ways, options, way):
    assert tokenizer.eos_token_id == 1
    inputs, options = batch(2), {"max_new_tokens": 25, "do_sample": False, **options}
    if options.get("eos_token_id", 1) is None:
        model.generation_config.eos_token_id = None
    processor = RegexLogitsProcessor(PATTERN, tokenizer)
    expected = model.generate(**inputs, logits_processor=[processor], **options)
    with hf_accel.patch(model):
        found = model.generate(**inputs, logits_processor=[processor], **options)
    assert ways == [way]
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))


def test_sampling_processors_of_others_and_subclasses_go_hfs_way(model, tokenizer, ways):
    class Banning(ChoiceLogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = super().__call__(input_ids, scores)
            scores[:, tokenizer("no")["input_ids"]] = -torch.inf
            return scores

    inputs, end = batch(2), tokenizer.eos_token
    choice = ChoiceLogitsProcessor(["yes", "no"], tokenizer)
    with hf_accel.patch(model):
        for options in (
            {"logits_processor": [choice, lambda ids, scores: scores]},
            {"logits_processor": [choice, ChoiceLogitsProcessor(["yes", "nay"], tokenizer)], "do_sample": False},
            {"logits_processor": [Banning(["yes", "no"], tokenizer)], "do_sample": False},
            {"logits_processor": [choice], "do_sample": True, "temperature": 4.0, "num_return_sequences": 4},
        ):
            outputs = model.generate(**inputs, max_new_tokens=6, **options)[:, 9:]
            texts = {tokenizer.decode(row).split(end)[0] for row in outputs}
            assert texts <= {"yes", "no"} if choice in options["logits_processor"][:1] else texts == {"yes"}
            assert len(options["logits_processor"]) == 1 or "do_sample" not in options or texts == {"yes"}
    assert ways == ["lockstep"] * 4


def test_more_tokens_than_logits_goes_hfs_way(tokenizer, ways):
    from ..tiny import make_tiny_llama

    model = make_tiny_llama(vocab_size=len(tokenizer) - 40)
    processor = RegexLogitsProcessor("[0-9]{3}", tokenizer)
    with hf_accel.patch(model):
        ids = torch.randint(10, 200, (1, 4))
        output = model.generate(ids, max_new_tokens=8, do_sample=False, logits_processor=[processor], eos_token_id=1)
    assert re.fullmatch("[0-9]{3}", tokenizer.decode(output[0, 4:]).split(tokenizer.eos_token)[0])
    assert ways == ["lockstep"]


@pytest.mark.parametrize("kind", ["json_schema", "grammar"])
@pytest.mark.parametrize("length", [1, 4, 40])
def test_an_output_as_the_next_prompt(model, tokenizer, ways, length, kind):
    """Cut outputs are gone on with, whole ones begin anew: as with the unpatched model, call after call."""
    if kind == "grammar":
        pytest.importorskip("llguidance")
    first = Constraint.json_schema(SCHEMA) if kind == "json_schema" else Constraint.grammar(GRAMMAR)
    found = []
    inputs = batch(2)
    for patched in (False, True):
        if patched:
            hf_accel.patch(model)
        processor = ConstraintLogitsProcessor([first, Constraint.choice(["yes", "no"])], tokenizer)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(4):
            ids = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=False, logits_processor=[processor]
            )
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        found.append(ids)
    assert torch.equal(*found)
    assert ways[0] == "native" and (length > 1 or "lockstep" in ways)


def test_a_prompt_that_another_call_had_begins_anew_after_reset(model, tokenizer):
    processor = RegexLogitsProcessor("[ab]{6}", tokenizer)
    ids = torch.tensor([[11, 12, 13]])
    options = {"do_sample": False, "logits_processor": [processor]}
    with hf_accel.patch(model):
        cut = model.generate(ids, max_new_tokens=1, **options)
        processor.reset()
        new = tokenizer.decode(model.generate(cut, max_new_tokens=9, **options)[0, 4:])
        assert re.fullmatch("[ab]{6}", new.split(tokenizer.eos_token)[0])


def text_of(tokenizer, row) -> str:
    return tokenizer.decode(row[9:]).split(tokenizer.eos_token)[0]


def test_a_constraint_for_each_prompt_by_keyword(model, tokenizer, ways):
    inputs = batch(3)
    options = {"max_new_tokens": 60, "tokenizer": tokenizer}
    with hf_accel.patch(model):
        free = model.generate(**inputs, max_new_tokens=60, do_sample=False)[2]
        rows = model.generate(**inputs, json_schema=[SCHEMA, {"enum": [1, 2]}, None], do_sample=False, **options)
        assert list(json.loads(text_of(tokenizer, rows[0]))) == ["n", "s"] and text_of(tokenizer, rows[1]) in "12"
        assert torch.equal(rows[2], free[: len(rows[2])])
        rows = model.generate(
            **inputs, choice=[["red", "blue"], None, ["up"]], num_return_sequences=3, do_sample=True, **options
        )
        assert all(text_of(tokenizer, row) in ("red", "blue") for row in rows[:3])
        assert all(text_of(tokenizer, row) == "up" for row in rows[6:])
        rows = model.generate(
            **inputs, json_object=[True, False, False], regex=[None, "[0-9]{2}", None], num_beams=2, **options
        )
        assert re.fullmatch("[0-9]{2}", text_of(tokenizer, rows[1]))
        mixed = [Constraint.choice(["x y"]), SCHEMA, None]
        rows = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], constraint=mixed, **options)
        assert text_of(tokenizer, rows[0]) == "x y"
        for bad, message in [
            ({"regex": ["a", "b"]}, "list of 2 constraints for 3 prompts"),
            ({"regex": []}, "empty"),
            ({"regex": ["a"] * 3, "choice": ["b"]}, "only one of regex and choice"),
            ({"regex": ["a"] * 3, "json_schema": [None] * 2}, "different|each prompt"),
            ({"constraint": "abc"}, "several things"),
        ]:
            with pytest.raises(ValueError, match=message):
                model.generate(**inputs, **bad, **options)
    assert ways.count("native") == 3


@pytest.mark.parametrize("by_name", [False, True])
def test_the_ends_of_a_keywords_constraint_are_the_calls(model, tokenizer, ways, by_name):
    """Those of its config, else of the model's, else of the tokenizer, wherever the config stands among the arguments."""
    model.generation_config.eos_token_id = [30, 31]
    ids = torch.randint(40, 200, (2, 9))
    with hf_accel.patch(model):
        for own, ends in ((None, {30, 31}), (32, {32})):
            config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=own, pad_token_id=2)
            given = {"generation_config": config} if by_name else {}
            rows = model.generate(ids, *([] if by_name else [config]), regex="[ab]{3}", tokenizer=tokenizer, **given)
            for row in rows[:, 9:].tolist():
                end = next(i for i, token in enumerate(row) if token in ends)
                assert re.fullmatch("[ab]{3}", tokenizer.decode(row[:end]))
    assert ways == ["native"] * 2


def test_public_names(tokenizer):
    processor = hf_accel.ConstraintLogitsProcessor([hf_accel.Constraint.regex("a"), None], tokenizer)
    assert len(processor.compiled(4)) == 4 and processor.compiled(4)[2:] == [None, None]
