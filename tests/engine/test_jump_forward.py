"""Guessed tokens change no answer: greedy or drawn, however the engine runs. They save steps."""

from __future__ import annotations

import pytest
import torch

from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection

from ..tiny import make_tiny_llama

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 7},
        "house": {"enum": ["Gryffindor", "Slytherin"]},
        "alive": {"type": "boolean"},
        "year": {"type": "integer", "minimum": 1, "maximum": 1999},
    },
    "required": ["name", "house", "alive", "year"],
    "additionalProperties": False,
}
PATTERN = r"(The answer is [0-9]{1,3}, and that is final\. ){2,3}"
CONFIG = {"page_size": 4, "num_pages": 300, "max_num_seqs": 12}
FAULTS = FaultInjection(retract_every=3, check_integrity=True)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(int(torch.randint(1 << 30, ())))
    model = make_tiny_llama(vocab_size=len(tokenizer) + 7)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def wanted(jump_forward: bool) -> list[SamplingParams]:
    options = {"max_tokens": 60, "jump_forward": jump_forward}
    return [
        SamplingParams(json_schema=SCHEMA, temperature=0, **options),
        SamplingParams(json_schema=SCHEMA, temperature=3.0, seed=1, n=2, **options),
        SamplingParams(json_schema=SCHEMA, temperature=1.0, top_p=0.9, seed=2, logprobs=1, **options),
        SamplingParams(regex=PATTERN, temperature=0, logit_bias={7: 1.5}, min_tokens=12, **options),
        SamplingParams(regex=PATTERN, temperature=0, stop="final", **options),
        SamplingParams(regex=PATTERN, temperature=0, **{**options, "max_tokens": 5}),
        SamplingParams(regex=PATTERN, temperature=1.0, seed=3, stop_token_ids=[11, 35], **options),
        SamplingParams(json_schema=SCHEMA, temperature=0, repetition_penalty=1.2, **options),
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(
            json_schema=SCHEMA, temperature=2.0, seed=4, close_within_budget=True, **{**options, "max_tokens": 50}
        ),
    ]


def run(engine: Engine, jump_forward: bool) -> list:
    prompts = [[20, 21, 22, 23, 30 + i] for i in range(10)]
    outputs = engine.generate(prompts, wanted(jump_forward))
    assert all(o.error is None for o in outputs)
    engine.check_integrity()
    return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in o.outputs] for o in outputs], [
        [(p.logprob, p.top) for p in c.logprobs] for o in outputs for c in o.outputs if c.logprobs
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        {"overlap": True, "max_num_batched_tokens": 14, "max_prefill_chunk": 2},
        {"faults": FAULTS},
        {"overlap": True, "faults": FAULTS},
        {"num_pages": 34, "faults": FaultInjection(check_integrity=True)},
        {"num_pages": 34, "overlap": True, "faults": FaultInjection(check_integrity=True)},
        {"enable_prefix_cache": False, "fused": False},
    ],
    ids=str,
)
def test_answers_are_the_same(model, tokenizer, options):
    expected, logprobs = run(Engine(model, tokenizer, **CONFIG), False)
    engine = Engine(model, tokenizer, **{**CONFIG, **options})
    for jump_forward in (False, True, True):
        found, own = run(engine, jump_forward)
        assert found == expected
        for row, other in zip(own, logprobs, strict=True):
            assert [p for p, _ in row] == pytest.approx([p for p, _ in other], abs=1e-4)
            assert [list(top) for _, top in row] == [list(top) for _, top in other]
    assert engine.stats().num_pages_free + engine.stats().num_pages_cached == engine.stats().num_pages_total


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_it_saves_steps(model, tokenizer, overlap, temperature):
    engine, steps = Engine(model, tokenizer, overlap=overlap, **CONFIG), []
    for jump_forward in (False, True, True, True):
        before = engine.stats().num_steps
        one = SamplingParams(
            json_schema=SCHEMA, temperature=temperature, seed=1, max_tokens=90, jump_forward=jump_forward
        )
        engine.generate([[7, 8, 9]], one)
        steps.append(engine.stats().num_steps - before)
    assert max(steps[1:]) < steps[0] and steps[3] < 0.5 * steps[0]


def test_a_stream_gets_every_token_once(model, tokenizer):
    one = SamplingParams(json_schema=SCHEMA, temperature=0, max_tokens=60, jump_forward=False)
    expected = Engine(model, tokenizer, **CONFIG).generate([[5, 6]], one)[0].outputs[0]
    for overlap in (False, True):
        engine = Engine(model, tokenizer, overlap=overlap, **CONFIG)
        for _ in range(2):
            chunks = list(engine.stream([5, 6], SamplingParams(json_schema=SCHEMA, temperature=0, max_tokens=60)))
            assert [i for chunk in chunks for i in chunk.token_ids] == expected.token_ids
            assert "".join(chunk.text for chunk in chunks) == expected.text
        assert len(chunks) < len(expected.token_ids)  # some steps brought several


def test_a_stop_string_inside_guessed_text_ends_it_there(model, tokenizer):
    engine = Engine(model, tokenizer, **CONFIG)
    for limit in (60, 12, 9):
        found = []
        for jump_forward in (False, True, True):
            one = SamplingParams(
                regex=PATTERN, temperature=0, stop=["is [", "wer"], max_tokens=limit, jump_forward=jump_forward
            )
            found.append(engine.generate([[9, 9, 9]], one)[0].outputs[0])
        assert [f.text for f in found] == ["The ans"] * 3
        assert len({(tuple(f.token_ids), f.finish_reason, f.stop_reason) for f in found}) == 1


def test_aborting_while_guesses_are_verified_leaks_nothing(model, tokenizer):
    engine = Engine(model, tokenizer, overlap=True, **{**CONFIG, "faults": FaultInjection(check_integrity=True)})
    for num_steps in range(1, 9):
        ids = [engine.add_request([3, 4, i], SamplingParams(json_schema=SCHEMA, temperature=0)) for i in range(3)]
        for _ in range(num_steps):
            engine.step()
        for request_id in ids:
            engine.abort(request_id)
            engine.result(request_id)
        engine.check_integrity()
    stats = engine.stats()
    assert stats.num_pages_free + stats.num_pages_cached == stats.num_pages_total
