"""Constrained requests in the engine: sound, independent of the batch, the loop, retraction, chunks and prefix hits."""

from __future__ import annotations

import gc
import json
import re
import weakref

import pytest
import torch

from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection
from hf_accel.engine import constraints
from hf_accel.structured.logits_processor import RegexLogitsProcessor
from hf_accel.structured.syntax import StructureError

PATTERN = r"[A-Z][a-zé]{2,5}( [0-9]{1,3})?\."
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 18}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
CONFIG = {"page_size": 4, "num_pages": 200, "max_num_seqs": 16}


def params(**options) -> list[SamplingParams]:
    """Constrained and free rows, greedy and sampled, with and without edits."""
    options = {"max_tokens": 70, **options}
    return [
        SamplingParams(regex=PATTERN, temperature=0, **options),
        SamplingParams(regex=PATTERN, temperature=5.0, seed=1, n=2, **options),
        SamplingParams(json_schema=SCHEMA, temperature=2.0, seed=2, repetition_penalty=1.3, logprobs=2, **options),
        SamplingParams(temperature=0, max_tokens=9),
        SamplingParams(choice=["yes", "no", "maybe"], temperature=3.0, seed=3, top_k=5, ignore_eos=True, **options),
        SamplingParams(temperature=1.0, seed=4, max_tokens=11),
        SamplingParams(json_schema=SCHEMA, temperature=0, logit_bias={5: 2.0}, **options),
    ]


def run(engine: Engine, order: list[int] | None = None) -> list[list[list[int]]]:
    wanted = params()
    order = list(range(len(wanted))) if order is None else order
    prompts = [[11, 12, 13, 14, 15, 16, 17, 30 + i] for i in range(len(wanted))]
    outputs = engine.generate([prompts[i] for i in order], [wanted[i] for i in order])
    assert all(o.error is None for o in outputs)
    engine.check_integrity()
    by_index = dict(zip(order, outputs, strict=True))
    return [[c.token_ids for c in by_index[i].outputs] for i in sorted(by_index)]


def test_outputs_satisfy_their_constraints(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    for seed in range(4):
        torch.manual_seed(seed)
        outputs = engine.generate([[20 + seed, 21]] * 7, params())
        for one, output in zip(params(), outputs, strict=True):
            for completion in output.outputs:
                text = tokenizer.decode([t for t in completion.token_ids if t != tokenizer.eos_token_id])
                if not one.constrained or completion.finish_reason == "length":
                    continue
                assert completion.finish_reason == "stop" and completion.token_ids[-1] == tokenizer.eos_token_id
                if one.regex:
                    assert re.fullmatch(PATTERN, text)
                elif one.choice:
                    assert text in one.choice
                else:
                    value = json.loads(text)
                    assert 0 <= value["n"] <= 99 and len(value["s"]) <= 18


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True},
        {"max_num_batched_tokens": 3, "max_prefill_chunk": 2},
        {"faults": FaultInjection(retract_every=3, check_integrity=True)},
        {"overlap": True, "faults": FaultInjection(retract_every=4, check_integrity=True)},
        {"num_pages": 30},
        {"num_pages": 30, "overlap": True},
        {"enable_prefix_cache": False, "fused": False},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_how_the_engine_runs(model, tokenizer, options):
    expected = run(Engine(model, tokenizer, **CONFIG))
    engine = Engine(model, tokenizer, **{**CONFIG, **options})
    assert run(engine) == expected
    assert run(engine, order=[6, 2, 0, 5, 1, 4, 3]) == expected  # permuted, on cached prefixes
    assert [run(engine, order=[i])[0] for i in range(7)] == expected  # each alone


def test_greedy_answers_equal_hfs_with_our_processor(model, tokenizer):
    ids = torch.tensor([[11, 12, 13]])
    processor = RegexLogitsProcessor(PATTERN, tokenizer)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[processor], **options)[0, 3:]
    output = Engine(model, tokenizer, **CONFIG).generate(
        [[11, 12, 13]], SamplingParams(regex=PATTERN, temperature=0, max_tokens=30)
    )[0]
    assert output.outputs[0].token_ids == expected.tolist()


def test_a_constraint_that_the_model_satisfies_anyway_changes_nothing(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    free = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
    plain = engine.generate([[40, 41, 42]], free)[0].outputs[0]
    anything = SamplingParams(regex=r"(?s).*", temperature=0, max_tokens=20, logprobs=0)
    constrained = engine.generate([[40, 41, 42]], anything)[0].outputs[0]
    same = next((i for i, (a, b) in enumerate(zip(plain.token_ids, constrained.token_ids)) if a != b), 20)
    decoded = tokenizer.decode(plain.token_ids[: same + 1])
    assert (
        same == 20
        or "\ufffd" in decoded
        or plain.token_ids[same] in tokenizer.all_special_ids + list(range(len(tokenizer), len(tokenizer) + 7))
    )


def test_the_constraint_wins_over_min_tokens(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    one = SamplingParams(choice=["yes", "no"], temperature=0, min_tokens=12, max_tokens=20)
    completion = engine.generate([[9, 8]], one)[0].outputs[0]
    assert completion.text in ("yes", "no") and completion.token_ids.count(tokenizer.eos_token_id) == 1


def test_streaming_and_aborting(model, tokenizer):
    engine = Engine(model, tokenizer, overlap=True, **CONFIG)
    one = SamplingParams(json_schema=SCHEMA, temperature=0, max_tokens=60)
    whole = engine.generate([[5, 6]], one)[0].outputs[0].text
    assert "".join(chunk.text for chunk in engine.stream([5, 6], one)) == whole
    for _ in engine.stream([5, 6], one):
        break  # leaving aborts it
    assert engine.generate([[5, 6]], one)[0].outputs[0].text == whole
    engine.check_integrity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a(?=b)"}, "lookahead"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"choice": []}, "at least one"),
        ({"json_schema": object()}, "no JSON Schema"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_queued(model, tokenizer, options, message):
    engine = Engine(model, tokenizer, **CONFIG)
    with pytest.raises(StructureError, match=message):
        engine.generate([[1, 2], [3, 4]], [SamplingParams(), SamplingParams(**options)])
    assert not engine.has_unfinished_requests and not engine.core.requests


def test_missing_tokenizer_or_eos_and_two_constraints(model, tokenizer):
    with pytest.raises(StructureError, match="needs a tokenizer"):
        Engine(model, **CONFIG).generate([[1]], SamplingParams(regex="a"))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(StructureError, match="end of sequence"):
        Engine(model, tokenizer, **CONFIG).generate([[1]], SamplingParams(regex="a"))
    with pytest.raises(ValueError, match="only one of"):
        SamplingParams(regex="a", json_object=True)


def test_tables_that_are_full_go_with_their_rows(model, tokenizer, monkeypatch):
    """Every automaton in a table of its own, several tables in one batch: the same answers, and nothing is kept."""
    expected = run(Engine(model, tokenizer, **CONFIG))
    monkeypatch.setattr(constraints, "ARENA_BYTES", 0)
    tables = []
    made = constraints.MaskTable

    def noted(*args):
        tables.append(made(*args))
        return tables[-1]

    monkeypatch.setattr(constraints, "MaskTable", noted)
    for overlap in (False, True):
        engine = Engine(model, tokenizer, overlap=overlap, **CONFIG)
        assert run(engine) == expected
        assert len(tables) >= 3
        kept = [weakref.ref(table) for table in tables]
        tables.clear()
        gc.collect()
        assert sum(ref() is not None for ref in kept) <= 1
