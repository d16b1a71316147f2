"""Constraints through `AcceleratedPipeline`: one for all prompts or one for each, in one call of `generate`."""

from __future__ import annotations

import json
import re

import pytest

import hf_accel
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor

pydantic = pytest.importorskip("pydantic")

PROMPTS = ["def f(", "class", "x = 1\ny", "import"]
OPTIONS = {"max_new_tokens": 60, "do_sample": False, "return_full_text": False}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=99)


@pytest.fixture
def pipe(model, tokenizer):
    return hf_accel.AcceleratedPipeline(model=model, tokenizer=tokenizer)


@pytest.fixture
def calls(pipe, monkeypatch) -> list[int]:
    """How many rows each call of `generate` had."""
    seen, generate = [], pipe.model.generate
    monkeypatch.setattr(
        pipe.model, "generate", lambda **kwargs: (seen.append(len(kwargs["input_ids"])), generate(**kwargs))[1]
    )
    return seen


def texts(answers) -> list[str]:
    return [answer[0]["generated_text"] for answer in answers]


def test_one_schema_for_all(pipe, calls):
    for text in texts(pipe(PROMPTS, json_schema=Person, **OPTIONS)):
        assert list(Person.model_validate_json(text).model_dump()) == ["name", "age"]
    assert calls == [4], "prompts of any length share a call"
    [alone] = pipe(PROMPTS[0], json_schema=Person, **OPTIONS)
    assert Person.model_validate_json(alone["generated_text"])


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_a_schema_for_each(pipe, calls, batch_size):
    free = texts(pipe(PROMPTS, **OPTIONS))[1]
    asked = [{"enum": [1]}, None, Person, {"type": "boolean"}]
    for prompts in (PROMPTS, (p for p in PROMPTS)):
        found = texts(pipe(prompts, json_schema=asked, batch_size=batch_size, **OPTIONS))
        assert found[0] == "1" and found[1] == free and found[3] in ("true", "false")
        assert Person.model_validate_json(found[2])
    many = pipe(
        PROMPTS, choice=[["a", "b"], ["c"], None, ["d e"]], num_return_sequences=2, **{**OPTIONS, "do_sample": True}
    )
    assert [{a["generated_text"] for a in answers} <= {"a", "b", "c", "d e"} for answers in many] == [
        True,
        True,
        False,
        True,
    ]
    if batch_size is None:
        assert calls == [4] * 4


def test_full_text_and_lists_of_prompts_in_any_order(pipe):
    options = {**OPTIONS, "return_full_text": True}
    found = texts(pipe(PROMPTS[::-1], regex=["[0-9]{2}", "[a-c]{2}", None, "z"], **options))
    assert re.fullmatch(re.escape("import") + "[0-9]{2}", found[0])
    assert re.fullmatch(re.escape("x = 1\ny") + "[a-c]{2}", found[1])
    assert found[3] == "def f(z"


def test_streams(pipe):
    pieces: dict[int, str] = {0: "", 1: "", 2: "", 3: ""}
    for index, piece in pipe(
        PROMPTS, stream=True, json_schema=[Person, {"enum": ["a b"]}, {"enum": [7]}, Person], **OPTIONS
    ):
        pieces[index] += piece
    assert Person.model_validate_json(pieces[0]) and json.loads(pieces[1]) == "a b" and pieces[2] == "7"
    assert "".join(pipe(PROMPTS[0], stream=True, choice=["go on"], **OPTIONS)) == "go on"


def test_wrong_lists(pipe):
    for prompts in (PROMPTS, (p for p in PROMPTS)):
        with pytest.raises(ValueError, match=r"list of (2|3) constraints"):
            list(pipe(prompts, regex=["a"] * 3, **OPTIONS))
    with pytest.raises(ValueError, match="list of 2 constraints for 4 prompts"):
        pipe(PROMPTS, stream=True, regex=["a"] * 2, **OPTIONS)
    with pytest.raises(ValueError, match="list of 2 constraints for 1 prompts"):
        pipe(PROMPTS[0], regex=["a"] * 2, **OPTIONS)


def test_processors(pipe, calls, tokenizer):
    processor = ConstraintLogitsProcessor({"enum": [3]}, tokenizer)
    assert texts(pipe(PROMPTS, logits_processor=[processor], **OPTIONS)) == ["3"] * 4
    assert calls == [4], "a constraint of ours keeps no prompts apart"
    texts(pipe(PROMPTS[:2], logits_processor=[processor, lambda ids, scores: scores], **OPTIONS))
    assert calls == [4, 1, 1]
    several = ConstraintLogitsProcessor([{"enum": [3]}, {"enum": [4]}], tokenizer)
    with pytest.raises(ValueError, match="1 rows cannot be shared out among 2"):
        pipe(PROMPTS[:2], logits_processor=[several], **OPTIONS)


def test_a_constraint_of_a_pipeline(model, tokenizer):
    pipe = hf_accel.AcceleratedPipeline(model=model, tokenizer=tokenizer, choice=["up", "down"])
    assert set(texts(pipe(PROMPTS, **OPTIONS))) <= {"up", "down"}
