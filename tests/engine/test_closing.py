"""Constrained requests that must be complete within max_tokens, however the engine runs; and cut ones that say so."""

from __future__ import annotations

import json
import re

import pytest
import torch

from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection
from hf_accel.engine import constraints
from hf_accel.structured.logits_processor import RegexLogitsProcessor
from hf_accel.structured.syntax import StructureError

from ..tiny import make_tiny_llama

PATTERN = r"([a-z]+ ){2,}end\."
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string", "minLength": 4, "maxLength": 400}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
CONFIG = {"page_size": 4, "num_pages": 200, "max_num_seqs": 16}
CLOSES = {"close_within_budget": True}


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Weights, and what a plain run of `params` gives on them."""
    model = make_tiny_llama(vocab_size=len(tokenizer) + 7)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.state_dict(), run(Engine(model, tokenizer, **CONFIG))


def params(jump_forward: bool = True) -> list[SamplingParams]:
    """Rows that close, rows that are cut, free ones; greedy and sampled, with edits of every kind."""
    closes = {**CLOSES, "jump_forward": jump_forward}
    edits = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {5: 2.0}, "logprobs": 1}
    return [
        SamplingParams(regex=PATTERN, temperature=0, max_tokens=17, **closes),
        SamplingParams(regex=PATTERN, temperature=5.0, seed=1, n=2, max_tokens=13, **closes),
        SamplingParams(json_schema=SCHEMA, temperature=2.0, seed=2, max_tokens=20, **edits, **closes),
        SamplingParams(temperature=0, max_tokens=9),
        SamplingParams(json_schema=SCHEMA, temperature=4.0, seed=3, top_k=2, max_tokens=19, **closes),
        SamplingParams(regex=r"[a-z]{400}", temperature=1.0, seed=4, max_tokens=12),
        SamplingParams(json_schema=SCHEMA, temperature=0, max_tokens=18, min_tokens=18, ignore_eos=True, **closes),
    ]


def run(engine: Engine, order: list[int] | None = None, jump_forward: bool = True) -> list[list[list[int]]]:
    wanted = params(jump_forward)
    order = list(range(len(wanted))) if order is None else order
    prompts = [[11, 12, 13, 14, 15, 16, 17, 30 + i] for i in range(len(wanted))]
    outputs = engine.generate([prompts[i] for i in order], [wanted[i] for i in order])
    engine.check_integrity()
    for i, output in zip(order, outputs, strict=True):
        assert output.error is None
        for completion in output.outputs:
            assert len(completion.token_ids) <= wanted[i].max_tokens
            closes = wanted[i].close_within_budget
            assert completion.finish_reason == ("stop" if closes else "length")
            if closes and wanted[i].regex:
                assert re.fullmatch(PATTERN, completion.text)
            elif closes:
                assert len(json.loads(completion.text)["s"]) >= 4
    by_index = dict(zip(order, outputs, strict=True))
    return [[c.token_ids for c in by_index[i].outputs] for i in sorted(by_index)]


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True},
        {"max_num_batched_tokens": 3, "max_prefill_chunk": 2},
        {"overlap": True, "faults": FaultInjection(retract_every=4, check_integrity=True)},
        {"num_pages": 30, "overlap": True},
        {"enable_prefix_cache": False, "fused": False},
    ],
    ids=str,
)
def test_outputs_are_complete_however_the_engine_runs(model, tokenizer, expected, options):
    model.load_state_dict(expected[0])
    engine = Engine(model, tokenizer, **{**CONFIG, **options})
    assert run(engine, order=[6, 2, 0, 5, 1, 4, 3]) == expected[1]
    assert run(engine, jump_forward=False) == expected[1]
    assert run(engine, order=[4])[0] == expected[1][4]


def test_rows_of_several_tables_close_too(model, tokenizer, expected, monkeypatch):
    state, answers = expected
    model.load_state_dict(state)
    monkeypatch.setattr(constraints, "ARENA_BYTES", 0)  # each automaton in a table of its own
    assert run(Engine(model, tokenizer, **CONFIG)) == answers


def test_answers_equal_those_of_our_processor_in_plain_generate(model, tokenizer):
    ids = torch.tensor([[11, 12, 13]])
    for budget in (9, 14):
        processor = RegexLogitsProcessor(PATTERN, tokenizer, max_new_tokens=budget)
        options = {"max_new_tokens": budget, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[processor], **options)
        one = SamplingParams(regex=PATTERN, temperature=0, max_tokens=budget, **CLOSES)
        output = Engine(model, tokenizer, **CONFIG).generate([[11, 12, 13]], one)[0]
        assert output.outputs[0].token_ids == plain[0, 3:].tolist()


def test_nothing_changes_while_the_budget_is_far(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    one = {"regex": "[a-c]{3,5}", "temperature": 2.0, "seed": 5, "max_tokens": 60}
    outputs = engine.generate([[5, 6]] * 2, [SamplingParams(**one), SamplingParams(**one, **CLOSES)])
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_the_longest_position_is_a_budget_too(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    prompt = [7] * (model.config.max_position_embeddings - 16)
    output = engine.generate([prompt], SamplingParams(regex=PATTERN, temperature=0, max_tokens=None, **CLOSES))[0]
    assert re.fullmatch(PATTERN, output.outputs[0].text) and output.outputs[0].finish_reason == "stop"


def test_budgets_that_are_too_small_are_refused_before_anything_is_queued(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    one = {"json_schema": SCHEMA, "temperature": 0}
    with pytest.raises(StructureError, match=r"takes \d+ tokens .* only 5 may be generated: allow at least") as error:
        engine.generate([[1, 2], [3, 4]], [SamplingParams(), SamplingParams(max_tokens=5, **one, **CLOSES)])
    with pytest.raises(StructureError, match="only 5 may be generated"):
        engine.add_request([1, 2], SamplingParams(max_tokens=5, **one, **CLOSES))
    assert not engine.has_unfinished_requests and not engine.core.requests
    needed = int(re.search(r"at least (\d+)", str(error.value))[1])
    output = engine.generate([[3, 4]], SamplingParams(max_tokens=needed, **one, **CLOSES))[0].outputs[0]
    assert len(output.token_ids) == needed and len(json.loads(output.text)["s"]) >= 4
    with pytest.raises(ValueError, match="needs a constraint"):
        SamplingParams(**CLOSES)
