"""Dynamic constraints in the engine: sound, and independent of the batch, the loop, retraction, chunks and prefix hits."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from hf_accel import Engine, GrammarLogitsProcessor, SamplingParams
from hf_accel.config import FaultInjection
from hf_accel.structured.syntax import StructureError

from ..structured.grammars import ARITHMETIC, ARITHMETIC_GBNF, TREE, scan_arithmetic
from ..tiny import make_tiny_llama

pytest.importorskip("llguidance")

CONFIG = {"page_size": 4, "num_pages": 200, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = make_tiny_llama(vocab_size=len(tokenizer) + 7)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


WANTED = [
    SamplingParams(grammar=ARITHMETIC, temperature=0, max_tokens=30),
    SamplingParams(grammar=ARITHMETIC, temperature=5.0, seed=1, n=2, max_tokens=40),
    SamplingParams(json_schema=TREE, temperature=2.0, seed=2, repetition_penalty=1.3, logprobs=2, max_tokens=40),
    SamplingParams(temperature=0, max_tokens=9),
    SamplingParams(choice=["yes", "no", "maybe"], temperature=3.0, seed=3, max_tokens=9),
    SamplingParams(
        grammar=ARITHMETIC_GBNF, temperature=1.0, seed=4, max_tokens=30, logit_bias={5: 2.0}, ignore_eos=True
    ),
]


def run(engine: Engine, order: list[int]) -> dict[int, list[list[int]]]:
    prompts = [[11, 12, 13, 14, 15, 16, 17, 30 + i] for i in order]
    outputs = engine.generate(prompts, [WANTED[i] for i in order])
    assert all(o.error is None for o in outputs)
    engine.check_integrity()
    return {i: [c.token_ids for c in o.outputs] for i, o in zip(order, outputs, strict=True)}


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return run(Engine(model, tokenizer, **CONFIG), list(range(6)))


def is_right(params: SamplingParams, text: str) -> bool:
    if params.grammar is not None:
        return scan_arithmetic(text.encode())[1]
    if params.json_schema is not None:
        return jsonschema.Draft202012Validator(TREE).is_valid(json.loads(text))
    return params.choice is None or text in params.choice


def test_outputs_satisfy_their_constraints(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    num_ended = 0
    for seed in range(3):
        outputs = engine.generate([[20 + seed, 21]] * 6, WANTED)
        for params, output in zip(WANTED, outputs, strict=True):
            for one in output.outputs:
                assert one.finish_reason in ("stop", "length")
                if one.finish_reason == "stop" and params.constrained:
                    assert one.token_ids[-1] == tokenizer.eos_token_id
                    assert is_right(params, tokenizer.decode(one.token_ids[:-1]))
                    num_ended += 1
    assert num_ended > 9


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True},
        {"max_num_batched_tokens": 3, "max_prefill_chunk": 2},
        {"overlap": True, "faults": FaultInjection(retract_every=4, check_integrity=True)},
        {"num_pages": 30},
        {"enable_prefix_cache": False, "fused": False},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_how_the_engine_runs(model, tokenizer, expected, options):
    engine = Engine(model, tokenizer, **{**CONFIG, **options})
    assert run(engine, [4, 2, 0, 5, 1, 3]) == expected
    assert run(engine, [2, 3]) == {i: expected[i] for i in (2, 3)}  # on cached prefixes, beside a free row


def test_greedy_answers_equal_hfs_with_our_processor(model, tokenizer):
    ids = torch.tensor([[11, 12, 13]])
    processor = GrammarLogitsProcessor(ARITHMETIC, tokenizer)
    hf = model.generate(
        ids, attention_mask=torch.ones_like(ids), logits_processor=[processor], max_new_tokens=30, pad_token_id=0
    )
    engine = Engine(model, tokenizer, **CONFIG)
    one = SamplingParams(grammar=ARITHMETIC, temperature=0, max_tokens=30)
    assert engine.generate([[11, 12, 13]], one)[0].outputs[0].token_ids == hf[0, 3:].tolist()


def test_the_constraint_wins_over_min_tokens(model, tokenizer):
    one = SamplingParams(grammar='start: "yes" | "no"', temperature=0, min_tokens=12, max_tokens=20)
    assert Engine(model, tokenizer, **CONFIG).generate([[9, 8]], one)[0].outputs[0].text in ("yes", "no")


def test_a_dead_end_fails_its_request_alone(model, tokenizer):
    engine = Engine(model, tokenizer, overlap=True, **CONFIG)
    bad = SamplingParams(grammar=r'start: "x" /[^\s\S]/', temperature=0)
    good = SamplingParams(choice=["yes"], temperature=0)
    failed, fine = engine.generate([[1, 2], [3, 4]], [bad, good])
    assert isinstance(failed.error, StructureError) and "no way on after 1 tokens" in str(failed.error)
    assert fine.error is None and fine.outputs[0].text == "yes"
    engine.check_integrity()


def test_a_wrong_grammar_is_refused_before_anything_is_queued(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    with pytest.raises(StructureError, match="unknown name"):
        engine.generate([[1, 2], [3, 4]], [SamplingParams(), SamplingParams(grammar="start: foo")])
    assert not engine.has_unfinished_requests and not engine.core.requests
    with pytest.raises(ValueError, match="only one of"):
        SamplingParams(grammar=ARITHMETIC, regex="a")


def test_streaming_and_aborting(model, tokenizer):
    engine = Engine(model, tokenizer, overlap=True, **CONFIG)
    one = SamplingParams(json_schema=TREE, temperature=2.0, seed=3, max_tokens=30)
    whole = engine.generate([[5, 6]], one)[0].outputs[0].text
    for _ in engine.stream([5, 6], one):
        break  # leaving aborts it
    assert "".join(chunk.text for chunk in engine.stream([5, 6], one)) == whole
    engine.check_integrity()
