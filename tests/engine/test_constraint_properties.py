"""What constraints must hold in the engine, on random patterns and schemas, whatever else a request asks for."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_accel import Engine, SamplingParams
from hf_accel.engine.constraints import RowConstraint
from hf_accel.engine.logits_edits import SamplingRow
from hf_accel.engine.sampler import Sampler
from hf_accel.structured.automaton import compile_node
from hf_accel.structured.json_schema import compile_json_schema
from hf_accel.structured.jump_forward import TokenPredictor
from hf_accel.structured.mask_table import MaskTable
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import compile_fsm
from hf_accel.structured.vocabulary import Vocabulary

from ..structured.pattern_samples import byte_level_tokenizer, quiet, random_pattern
from ..structured.samples import schemas
from ..tiny import make_tiny_llama

CONFIG = {"page_size": 4, "num_pages": 1500, "max_num_seqs": 64}
PATTERN = r"(ab|[0-9é]{1,2}-){2,5}漢?\."
SEEDS = st.integers(0, 1 << 40)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return Vocabulary.of(tokenizer, len(tokenizer) + 7, [0, 2])


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    model = make_tiny_llama(vocab_size=len(tokenizer) + 7)
    model.generation_config.eos_token_id = [0, 2]
    return Engine(model, tokenizer, **CONFIG)


def texts(output: Any, vocabulary: Vocabulary) -> list[tuple[bytes, bool]]:
    """(bytes, whether it has ended) of each completion; no special token but the end stands in it."""
    assert output.error is None
    found = []
    for completion in output.outputs:
        ids = list(completion.token_ids)
        ended = completion.finish_reason == "stop"
        assert ended == (ids[-1] in vocabulary.eos_token_ids) and completion.finish_reason in ("stop", "length")
        found.append((b"".join(vocabulary.tokens[t] for t in ids[: len(ids) - ended]), ended))
    return found


def closing(engine: Engine, most: int, closes: bool, **options: Any) -> SamplingParams:
    """So many tokens, or as many as the shortest output takes where it must close."""
    fsm = engine._constraints.compile(SamplingParams(**options), 0)
    most = max(most, fsm.distances.needed) if closes else most
    return SamplingParams(max_tokens=most, close_within_budget=closes, **options)


@given(SEEDS)
@quiet(2)
def test_s1_outputs_of_random_patterns_match(engine, vocabulary, seed):
    """36 patterns in one batch, greedy and at temperature 5; those that must close do, those that are cut could have gone on."""
    rng = random.Random(seed)
    free = engine.stats().num_pages_free + engine.stats().num_pages_cached
    patterns, params = [], []
    for i in range(36):
        patterns.append(random_pattern(rng, depth=2))
        wild = {"temperature": 5.0, "n": 2, "seed": i} if i % 2 else {"temperature": 0}
        params.append(closing(engine, 24, i % 3 > 0, regex=patterns[-1], **wild))
    prompts = [[rng.randrange(3, 400) for _ in range(rng.randint(1, 6))] for _ in patterns]
    for pattern, one, output in zip(patterns, params, engine.generate(prompts, params), strict=True):
        for made, ended in texts(output, vocabulary):
            assert ended or not one.close_within_budget
            if ended:
                assert re.fullmatch(pattern, made.decode()), (pattern, made)
            else:
                assert compile_node(parse_regex(pattern)).walk(made) != DEAD, (pattern, made)
    engine.check_integrity()
    assert engine.stats().num_pages_free + engine.stats().num_pages_cached == free


@given(st.lists(schemas(1), min_size=10, max_size=10), SEEDS)
@quiet(2)
def test_s1_outputs_of_random_schemas_validate(engine, vocabulary, several, seed):
    kept, params = [], []
    for i, schema in enumerate(several):
        wild = {"temperature": 5.0, "seed": i} if i % 2 else {"temperature": 0}
        try:
            compile_json_schema(schema)
        except StructureError:
            with pytest.raises(StructureError):
                engine.add_request([3], SamplingParams(json_schema=schema, max_tokens=400, close_within_budget=True))
            continue
        kept.append(schema)
        params.append(closing(engine, 40, True, json_schema=schema, **wild))
    if not kept:
        return
    for schema, output in zip(kept, engine.generate([[3 + seed % 300]] * len(kept), params), strict=True):
        [(made, ended)] = texts(output, vocabulary)
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        assert ended
        validator.validate(json.loads(made, object_pairs_hook=_without_repeats))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({k for k, _ in pairs}) == len(pairs), "a key stands twice"
    return dict(pairs)


EDITS = [
    {"min_tokens": 30},
    {"ignore_eos": True},
    {"logit_bias": dict.fromkeys(range(420), -1000000000.0)},
    {"logit_bias": dict.fromkeys(range(420), -math.inf)},
    {"logit_bias": {0: 1e9, 2: 1e9}},
    {"repetition_penalty": 50.0, "presence_penalty": 9.0, "frequency_penalty": 9.0},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 2, "top_p": 0.1, "min_p": 0.9, "logprobs": 3},
    {"logits_processors": [lambda ids, logits: torch.full_like(logits, -math.inf)]},
    {"logits_processors": [lambda ids, logits: logits.flip(0)]},
    {"prompt_logprobs": 1},
    {"stop_token_ids": [7]},
]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_whatever_else_a_request_asks_for_its_constraint_holds(engine, vocabulary, temperature):
    params = [
        SamplingParams(regex=PATTERN, temperature=temperature, seed=i, max_tokens=35, close_within_budget=True, **edits)
        for i, edits in enumerate(EDITS)
    ]
    for edits, output in zip(EDITS, engine.generate([[5, 6, 7]] * len(EDITS), params), strict=True):
        for made, ended in texts(output, vocabulary):
            assert ended and re.fullmatch(PATTERN, made.decode()), (edits, made)


def test_stop_strings_within_the_grammar(engine, tokenizer):
    one = SamplingParams(regex="[a-c]{30}", stop=["bc", "ca"], temperature=5.0, seed=1, max_tokens=40, n=4)
    for completion in engine.generate([[9, 8]], one)[0].outputs:
        assert completion.finish_reason == "stop" and re.fullmatch("[a-c]*", completion.text)
        assert not re.search("bc|ca", completion.text)
        assert completion.stop_reason in ("bc", "ca") or len(completion.text) == 30


def test_log_probabilities_are_the_models_own(engine, tokenizer):
    """Before the mask, as before every other parameter: what was forbidden still has its share."""
    one = {"temperature": 0, "max_tokens": 4, "logprobs": 5}
    free = engine.generate([[9, 8, 7]], SamplingParams(**one))[0].outputs[0]
    held = engine.generate([[9, 8, 7]], SamplingParams(choice=["ab", "b_"], **one))[0].outputs[0]
    assert held.text in ("ab", "b_") and held.token_ids[0] != free.token_ids[0]
    assert held.logprobs[0].top == pytest.approx(free.logprobs[0].top, abs=1e-5)
    assert held.logprobs[0].logprob < free.logprobs[0].logprob


@pytest.mark.parametrize("overlap", [False, True])
def test_a_constraint_that_is_satisfied_anyway_changes_nothing(tokenizer, vocabulary, overlap):
    model = make_tiny_llama(vocab_size=len(tokenizer) + 7)
    model.generation_config.eos_token_id = 0
    other = [i for i, t in enumerate(vocabulary.tokens) if t is None or not t.isascii()]
    with torch.no_grad():
        model.lm_head.weight[other] = 0  # is never the likeliest
    engine = Engine(model, tokenizer, overlap=overlap, **CONFIG)
    prompts = [[9, 8, 7], [3, 4], [300, 200, 100, 50]]
    free = [o.outputs[0] for o in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24))]
    for close in (False, True):
        one = SamplingParams(regex="(?s).*", temperature=0, max_tokens=24, close_within_budget=close)
        held = [o.outputs[0] for o in engine.generate(prompts, one)]
        for a, b in zip(free, held, strict=True):
            assert b.token_ids[:23] == a.token_ids[:23]
            assert (b.token_ids[23] == 0) if close else (b.token_ids == a.token_ids)
            assert b.finish_reason == ("stop" if close else "length")


@given(SEEDS)
@quiet(2)
def test_draws_have_the_distribution_of_the_allowed_tokens(seed):
    """`a|ab|abc`, all ways to spell them, on known logits: chi-squared over ways, at odds of one in a million."""
    tokens = (b"a", b"b", b"c", b"ab", b"bc", b"abc", b"x", None)
    vocabulary, cpu = Vocabulary(tokens, (7,)), torch.device("cpu")
    fsm = compile_fsm(compile_node(parse_regex("a|ab|abc")), vocabulary)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, generator=generator)
    ways: dict[tuple[int, ...], float] = {}

    def spell(state: int, way: tuple[int, ...], probability: float) -> None:
        if way and way[-1] == 7:
            ways[way] = probability
            return
        allowed = fsm.allowed(state).tolist()
        shares = logits[allowed].softmax(dim=0).tolist()
        for token_id, share in zip(allowed, shares, strict=True):
            spell(fsm.advance(state, token_id)[0], (*way, token_id), probability * share)

    spell(fsm.start, (), 1.0)
    assert len(ways) == 7 and sum(ways.values()) == pytest.approx(1)
    num_rows, table, found = 3000, MaskTable(8, (7,), cpu), Counter()
    predictor = TokenPredictor(fsm, vocabulary)
    rows = [
        SamplingRow(
            SamplingParams(regex="a|ab|abc"), [1], 1, seed % 999983 + i, constraint=RowConstraint(predictor, table, 1)
        )
        for i in range(num_rows)
    ]
    while rows:
        for row in rows:
            row.settle()
        sampled = Sampler().sample(logits.expand(len(rows), 8).contiguous(), rows)
        for row, token in zip(rows, sampled, strict=True):
            assert token.error is None
            row.token_ids.append(token.token_id)
        found.update(tuple(row.token_ids[1:]) for row in rows if row.token_ids[-1] == 7)
        rows = [row for row in rows if row.token_ids[-1] != 7]
    assert set(found) <= set(ways)
    distance = sum((found[w] - num_rows * p) ** 2 / (num_rows * p) for w, p in ways.items())
    assert distance < 38.3, (found, ways)  # 6 degrees of freedom
