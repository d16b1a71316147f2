"""Distances to the end against exhaustive search, and endings within a budget: always complete, never narrower than needed."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch

import hf_accel
from hf_accel.structured.automaton import compile_node
from hf_accel.structured.closing import Closing, check_budget
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor, RegexLogitsProcessor
from hf_accel.structured.mask_table import DONE, MaskTable, mask_and_keep_alive
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import TokenFsm, compile_fsm
from hf_accel.structured.vocabulary import Vocabulary

EOS = (300, 302)
WORDS = ["ab", "abc", "aaaa", "12.5", '", "', '":"', '"}', 'a":"', '["', '"]', '{"', '""', "é", "aaaaaaaa", '."', "aaa"]
PATTERNS = ["a{3}|a{5}", r"-?[0-9]+(\.[0-9]+)?", "(yes|no|maybe)", "(ab|c){3,}d?", "(?s).{2,6}", "a{0,40}b|c{37}"]
COUNTED = [
    {"type": "string", "minLength": 3, "maxLength": 20},
    {"type": "string", "minLength": 18, "maxLength": 18},
    {"type": "string", "maxLength": 17},
    {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 30}, "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {"a": {"type": "string", "minLength": 11, "maxLength": 90}}, "required": ["a"]},
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    parts = ["漢".encode()[:2], "漢".encode()[1:], b"a\xc3"]
    tokens = [*(bytes([b]) for b in range(256)), *(w.encode() for w in WORDS), *parts]
    return Vocabulary((*tokens, *[None] * (320 - len(tokens))), EOS)


def moves(fsm: TokenFsm, state: int, count: int) -> dict[int, tuple[int, int]]:
    """Where each allowed token leads, by brute force."""
    return {t: fsm.advance(state, t, count) for t in fsm.allowed(state, count).tolist()}


def explored(fsm: TokenFsm) -> dict[tuple[int, int], int]:
    """Distances of everything that can be reached, by relaxation of single moves."""
    ways: dict[tuple[int, int], set[tuple[int, int]]] = {}
    todo = [(fsm.start, 0)]
    for at in todo:
        ways[at] = {(DONE, 0) if s == DONE else (s, c) for s, c in moves(fsm, *at).values()}
        todo += [a for a in ways[at] if a not in ways and a not in todo and a[0] != DONE]
    distance = dict.fromkeys(ways, 1 << 30) | {(DONE, 0): 0}
    changed = True
    while changed:
        changed = False
        for at, after in ways.items():
            nearer = 1 + min(distance[a] for a in after)
            changed |= nearer < distance[at]
            distance[at] = min(nearer, distance[at])
    return distance


def check(fsm: TokenFsm) -> None:
    expected = explored(fsm)
    assert {at: fsm.distances.at(*at) for at in expected} == expected
    assert fsm.distances.needed == expected[fsm.start, 0]
    assert fsm.distances.farthest >= max(expected.values())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_distances_equal_exhaustive_search(pattern, vocabulary):
    check(compile_fsm(compile_node(parse_regex(pattern)), vocabulary))


@pytest.mark.parametrize("schema", COUNTED, ids=str)
def test_distances_of_counted_texts_equal_exhaustive_search(schema, vocabulary):
    dfa = compile_json_schema(schema)
    assert any(dfa.counters)
    check(compile_fsm(dfa, vocabulary))


@pytest.mark.parametrize("shortcut", [b'xy."}', b'abcdefghijklm","x"]', b'"'], ids=str)
def test_distances_of_long_texts_are_few(vocabulary, shortcut):
    """The shortest way within texts of up to 65535 characters: as in those of 40, whatever the count. The best token may need room
    for many characters."""
    words = Vocabulary((*vocabulary.tokens[:256], shortcut, b'."}', b'ab"', *vocabulary.tokens[259:]), EOS)
    long, short = (
        compile_fsm(compile_json_schema({"type": "array", "items": item, "minItems": 2, "maxItems": 2}), words)
        for item in ({"type": "string", "maxLength": 65535}, {"type": "string", "maxLength": 30})
    )
    distances, expected = long.distances, explored(short)
    assert len(distances.values) < 1500
    states = np.flatnonzero(distances.of_state[:, 3])
    assert states.size
    for state in states.tolist():
        for above in range(30):
            if (state, 30 - above) in expected:
                assert distances.at(state, 65535 - above) == expected[state, 30 - above]
        assert len({distances.at(state, count) for count in range(0, 65000, 1000)}) == 1


def test_too_many_distances_are_refused(vocabulary):
    schema = {"type": "string", "minLength": 1 << 20, "maxLength": 1 << 21}
    with pytest.raises(StructureError, match="minLength"):
        _ = compile_fsm(compile_json_schema(schema), vocabulary).distances


@pytest.mark.parametrize("schema", [*COUNTED, {"type": "array", "items": {"type": "integer"}}], ids=str)
def test_exactly_what_still_fits_is_allowed(schema, vocabulary):
    """Rows of two automata, free and ended ones: every token that remains leads to an end in time, and no other is missing."""
    fsm = compile_fsm(compile_json_schema(schema), vocabulary)
    table = MaskTable(vocabulary.size, EOS, torch.device("cpu"))
    table.start(compile_fsm(compile_node(parse_regex("[ab]{3}")), vocabulary))
    closing, rng = Closing(fsm, table), random.Random(5)
    for _ in range(6):
        budget = fsm.distances.needed + rng.choice([0, 0, 1, 3, 20])
        at, made = (fsm.start, 0), b""
        for remaining in range(budget, 0, -1):
            state = table.global_state(fsm, *at)
            states = torch.tensor([state, DONE])
            logits = torch.randn(2, vocabulary.size)
            masked = table.masked(logits, states)
            closing.apply(masked, states, torch.tensor([remaining, remaining - budget]))
            found = torch.isfinite(masked)
            assert torch.equal(masked[found], logits[found])
            expected = {t for t, a in moves(fsm, *at).items() if fsm.distances.at(*a) <= remaining - 1}
            assert set(found[0].nonzero().flatten().tolist()) == expected and expected
            assert set(found[1].nonzero().flatten().tolist()) == set(EOS)
            if not closing.may_bind(remaining):
                assert expected == set(fsm.allowed(*at).tolist())
            token_id = rng.choice([t for t in expected if t not in EOS] or sorted(expected))
            at = fsm.advance(at[0], token_id, at[1])
            if token_id in EOS:
                break
            made += vocabulary.tokens[token_id]
        assert token_id in EOS
        json.loads(made)


def test_too_small_a_budget_takes_the_shortest_way(vocabulary):
    fsm = compile_fsm(compile_node(parse_regex("[ab]{3,9}c")), vocabulary)
    table = MaskTable(vocabulary.size, EOS, torch.device("cpu"))
    closing, states = Closing(fsm, table), torch.tensor([table.start(fsm)])
    made = []
    while not made or made[-1] not in EOS:
        scores = torch.full((1, vocabulary.size), -torch.inf)  # others have left nothing

        def close(logits: torch.Tensor, now: torch.Tensor = states) -> None:
            closing.apply(logits, now, torch.tensor([2]))

        scores = mask_and_keep_alive(table, scores, states, close)
        token_id = random.choice(torch.isfinite(scores[0]).nonzero().flatten().tolist())
        states, made = table.advance(states, torch.tensor([token_id])), [*made, token_id]
    assert len(made) == fsm.distances.needed == 3
    with pytest.raises(StructureError, match=r"takes 3 tokens .* only 2 .* at least 3"):
        check_budget(fsm, 2)
    check_budget(fsm, 3)


# ---- plain and patched generate --------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string", "minLength": 4, "maxLength": 300}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


def texts(tokenizer, outputs: torch.Tensor, prompt_length: int) -> list[str]:
    rows = [row[: row.index(tokenizer.eos_token_id)] for row in outputs[:, prompt_length:].tolist()]  # all have ended
    return [tokenizer.decode(row) for row in rows]


WAYS = [
    {},
    {"do_sample": True, "temperature": 5.0, "num_return_sequences": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "repetition_penalty": 1.8, "top_k": 2},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_processors_close_within_their_budget(model, tokenizer, options):
    processor = ConstraintLogitsProcessor(
        [Constraint.json_schema(SCHEMA), Constraint.regex(r"([a-z]+ )+end\.")], tokenizer, max_new_tokens=21
    )
    for length in (3, 6):  # reused, also for prompts of another length
        ids = torch.randint(10, 200, (2, length))
        mask = torch.ones_like(ids)
        outputs = model.generate(ids, attention_mask=mask, max_new_tokens=21, logits_processor=[processor], **options)
        found = texts(tokenizer, outputs, length)
        half = len(found) // 2
        assert all(len(json.loads(t)["s"]) >= 4 for t in found[:half])
        assert all(re.fullmatch(r"([a-z]+ )+end\.", t) for t in found[half:])


@pytest.mark.parametrize(
    ("options", "budget"), [(WAYS[1], {"max_new_tokens": 18}), (WAYS[2], {"max_length": 23}), ({}, {"max_length": 23})]
)
def test_patched_generate_closes_within_its_budget(model, tokenizer, options, budget):
    ids = torch.randint(10, 200, (2, 5))
    with hf_accel.patch(model):
        outputs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            tokenizer=tokenizer,
            json_schema=SCHEMA,
            close_within_budget=True,
            **budget,
            **options,
        )
    assert outputs.shape[1] <= 23
    assert all(len(json.loads(t)["s"]) >= 4 for t in texts(tokenizer, outputs, 5))


def test_budgets_that_cannot_be_kept_are_refused(model, tokenizer):
    ids = torch.randint(10, 200, (1, 5))
    asked = {"tokenizer": tokenizer, "regex": "[ab]{3}(xyz){9}", "close_within_budget": True}
    with pytest.raises(StructureError, match="only 4 may be generated"):
        RegexLogitsProcessor("[ab]{3}(xyz){9}", tokenizer, max_new_tokens=4)
    with hf_accel.patch(model):
        with pytest.raises(StructureError, match="only 4 may be generated"):
            model.generate(ids, max_new_tokens=4, **asked)
        with pytest.raises(StructureError, match="only 3 may be generated"):
            model.generate(ids, max_length=8, **asked)
        with pytest.raises(ValueError, match="needs a constraint"):
            model.generate(ids, close_within_budget=True)
        model.generation_config.max_length = model.generation_config.max_new_tokens = None
        with pytest.raises(ValueError, match="needs a budget"):
            model.generate(ids, **asked)


def test_pipeline_closes_within_its_budget(model, tokenizer):
    pipe = hf_accel.AcceleratedPipeline(model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 15, "do_sample": True, "temperature": 3.0, "return_full_text": False}
    answers = pipe(["def f(", "class"], json_schema=SCHEMA, close_within_budget=True, **options)
    assert all(len(json.loads(a[0]["generated_text"])["s"]) >= 4 for a in answers)


def test_nothing_waits_for_the_device(vocabulary):
    """On a device whose values nobody can read."""
    fsm = compile_fsm(compile_json_schema(COUNTED[0]), vocabulary)
    table = MaskTable(vocabulary.size, EOS, torch.device("cpu"))
    closing = Closing(fsm, table)
    for name, value in vars(closing).items():
        if isinstance(value, torch.Tensor):
            setattr(closing, name, value.to("meta"))
    states = torch.empty(7, dtype=torch.long, device="meta")
    closing.apply(torch.empty(7, vocabulary.size, device="meta"), states, states)
    with pytest.raises(RuntimeError, match="meta"):
        bool((states > 0).any())
