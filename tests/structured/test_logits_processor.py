"""Constraints on plain and patched `generate`: sound, stateless for the caller, indifferent to rows' order."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch

import hf_accel
from hf_accel.structured import row_memory
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.logits_processor import (
    ChoiceLogitsProcessor,
    ConstraintLogitsProcessor,
    JSONSchemaLogitsProcessor,
    RegexLogitsProcessor,
)
from hf_accel.structured.syntax import StructureError

PATTERN = r"[A-Z][a-zé]{2,5}( [0-9]{1,3})?\."
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 3}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


def texts(tokenizer, outputs, prompt_length) -> list[str | None]:
    """Texts of the rows that ended; None for those that were cut. Decoded from ids, specials and all."""
    found = []
    for row in outputs[:, prompt_length:].tolist():
        found.append(
            tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) if tokenizer.eos_token_id in row else None
        )
    return found


def run(model, tokenizer, processor, prompts=2, **options) -> list[str | None]:
    ids = torch.randint(10, 200, (prompts, 5))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **options}
    outputs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=tokenizer.eos_token_id,
        logits_processor=[processor],
        **options,
    )
    return texts(tokenizer, outputs, 5)


WAYS = [
    {},
    {"do_sample": True, "temperature": 5.0, "num_return_sequences": 4},
    {"num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "num_beams": 3},
    {"do_sample": True, "top_k": 3, "repetition_penalty": 1.8},
]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("options", WAYS)
def test_outputs_satisfy_their_constraint(model, tokenizer, options, patched):
    if patched:
        hf_accel.patch(model)
    regex = RegexLogitsProcessor(PATTERN, tokenizer)
    schema = JSONSchemaLogitsProcessor(SCHEMA, tokenizer)
    for _ in range(2):  # reused with no reset
        found = run(model, tokenizer, regex, **options)
        assert any(found) and all(re.fullmatch(PATTERN, t) for t in found if t is not None)
        for text in filter(None, run(model, tokenizer, schema, **options)):
            value = json.loads(text)
            assert 0 <= value["n"] <= 99 and len(value["s"]) <= 3 and list(value) == ["n", "s"]


def test_patched_and_plain_agree(model, tokenizer):
    processor = JSONSchemaLogitsProcessor(SCHEMA, tokenizer)
    torch.manual_seed(3)
    plain = run(model, tokenizer, processor, prompts=3)
    torch.manual_seed(3)
    hf_accel.patch(model)
    assert run(model, tokenizer, processor, prompts=3) == plain


@pytest.mark.parametrize(
    "asked", [{"regex": PATTERN}, {"json_schema": SCHEMA}, {"choice": ["yes", "no"]}, {"json_object": True}], ids=str
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 4.0}], ids=str)
def test_keywords_of_a_patched_generate(model, tokenizer, asked, options):
    ids = torch.randint(10, 200, (2, 5))
    with hf_accel.patch(model):
        outputs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
            max_new_tokens=40,
            tokenizer=tokenizer,
            **asked,
            **options,
        )
        with pytest.raises(ValueError, match="tokenizer=tokenizer"):
            model.generate(ids, **asked)
        with pytest.raises(StructureError, match="lookahead"):
            model.generate(ids, regex="a(?=b)", tokenizer=tokenizer)
    for text in filter(None, texts(tokenizer, outputs, 5)):
        if "regex" in asked:
            assert re.fullmatch(PATTERN, text)
        elif "choice" in asked:
            assert text in ("yes", "no")
        else:
            assert isinstance(json.loads(text), dict)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(ids, regex="a")  # HF's own again


def test_pipeline(model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    pipe = hf_accel.AcceleratedPipeline(model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 60, "do_sample": True, "temperature": 3.0, "return_full_text": False}
    answers = pipe(["def f(", "class"], choice=["red", "green"], **options)
    assert all(a[0]["generated_text"] in ("red", "green") for a in answers)
    [answer] = pipe("x = ", json_schema={"enum": [1, None, "a"]}, **options)
    assert json.loads(answer["generated_text"]) in (1, None, "a")


def test_one_constraint_a_row(model, tokenizer):
    processor = ConstraintLogitsProcessor([Constraint.choice(["red", "blue"]), Constraint.regex("[0-9]{2}")], tokenizer)
    found = run(model, tokenizer, processor, do_sample=True, temperature=3.0, num_return_sequences=3)
    assert all(t in ("red", "blue") for t in found[:3]) and all(re.fullmatch("[0-9]{2}", t) for t in found[3:])
    with pytest.raises(ValueError, match="3 rows cannot be shared out among 2"):
        run(model, tokenizer, processor, prompts=3)


def test_an_output_may_be_the_next_prompt(model, tokenizer):
    processor = ChoiceLogitsProcessor(["yes", "no"], tokenizer)
    ids, options = torch.randint(10, 200, (1, 5)), {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    for _ in range(3):
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            do_sample=False,
            logits_processor=[processor],
            **options,
        )
    answers = tokenizer.decode(ids[0, 5:]).split(tokenizer.eos_token)
    assert len(answers) == 4 and set(answers[:3]) <= {"yes", "no"} and answers[3] == ""


def test_the_constraint_wins_over_min_new_tokens(model, tokenizer):
    found = run(model, tokenizer, ChoiceLogitsProcessor(["yes", "no"], tokenizer), min_new_tokens=12)
    assert all(t in ("yes", "no") for t in found)


def test_threads_share_a_processor(model, tokenizer, monkeypatch):
    monkeypatch.setattr(row_memory, "_SAME_LENGTH", 2)
    found: dict[int, list] = {}
    prompts = [torch.randint(10, 200, (2, 5)) for _ in range(8)]
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}

    def answer(index: int, processor) -> list:
        ids = prompts[index]
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, logits_processor=[processor], **options).tolist()

    expected = [answer(i, JSONSchemaLogitsProcessor(SCHEMA, tokenizer)) for i in range(8)]
    shared = JSONSchemaLogitsProcessor(SCHEMA, tokenizer)
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, [answer(i, shared) for _ in range(2)]))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == [[e, e] for e in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_may_come_in_any_order_and_dtype(tokenizer, dtype):
    processor = RegexLogitsProcessor("(ab|cd)e", tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    start = torch.randint(10, 200, (3, 4))
    processor(start, torch.randn(3, len(tokenizer) + 5).to(dtype))
    step = torch.cat([start, torch.tensor([[ids("a")], [ids("c")], [ids("ab")]])], dim=1)
    order = torch.tensor([2, 0, 0, 1])
    scores = torch.randn(4, len(tokenizer) + 5).to(dtype)
    before = scores.clone()
    masked = processor(step[order], scores)
    allowed = [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in masked]
    spelled = [{tokenizer.convert_ids_to_tokens(i) for i in row} for row in allowed]
    assert spelled[0] == {"e"} and spelled[1] == spelled[2] and {"b"} <= spelled[1] <= {"b", "be"}
    assert {"d"} <= spelled[3] <= {"d", "de"}
    assert torch.equal(scores, before), "the caller's scores are its own"
    assert torch.equal(masked[torch.isfinite(masked)], before[torch.isfinite(masked)])


def test_unsupported_constraints_fail_at_once(tokenizer):
    with pytest.raises(StructureError, match="lookahead"):
        RegexLogitsProcessor("a(?=b)", tokenizer)
    with pytest.raises(StructureError, match="uniqueItems"):
        JSONSchemaLogitsProcessor({"type": "array", "uniqueItems": True}, tokenizer)
    with pytest.raises(StructureError, match="list of constraints is empty"):
        ConstraintLogitsProcessor([], tokenizer)
    with pytest.raises(StructureError, match="several things"):
        ConstraintLogitsProcessor(["a"], tokenizer)
    with pytest.raises(StructureError, match="end of sequence"):
        ChoiceLogitsProcessor(["a"], tokenizer, eos_token_ids=[])
