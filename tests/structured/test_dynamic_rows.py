"""Dynamic constraints on plain `generate`: every finished row parses, whatever order the rows come in, with automata beside."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

import hf_accel
from hf_accel import GrammarLogitsProcessor, JSONSchemaLogitsProcessor
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.vocabulary import Vocabulary

from .grammars import ARITHMETIC, TREE, allowed, compiled, scan_arithmetic

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def arithmetic(tokenizer):
    return GrammarLogitsProcessor(ARITHMETIC, tokenizer)


def run(model, tokenizer, processor, prompts=2, ids=None, padded=0, **options) -> list[str | None]:
    """Texts of the rows that ended, None for those that were cut."""
    ids = torch.randint(10, 200, (prompts, 5)) if ids is None else ids
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :padded], mask[0, :padded] = 0, 0
    eos = tokenizer.eos_token_id
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos, **options}
    rows = model.generate(ids, attention_mask=mask, logits_processor=[processor], **options)[:, 5:].tolist()
    ends = options["eos_token_id"] if isinstance(options["eos_token_id"], list) else [eos]
    ended = [next((i for i, t in enumerate(row) if t in ends), None) for row in rows]
    return [None if n is None else tokenizer.decode(row[:n]) for row, n in zip(rows, ended, strict=True)]


def is_arithmetic(text: str) -> bool:
    return scan_arithmetic(text.encode())[1]


def is_tree(text: str) -> bool:
    return jsonschema.Draft202012Validator(TREE).is_valid(json.loads(text))


WAYS = [
    {"padded": 3},
    {"do_sample": True, "temperature": 5.0, "num_return_sequences": 4, "padded": 2},
    {"num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "num_beams": 3, "repetition_penalty": 1.8, "top_k": 3},
]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_finished_rows_parse(model, tokenizer, arithmetic, options, patched):
    if patched:
        hf_accel.patch(model)
    tree = JSONSchemaLogitsProcessor(TREE, tokenizer)
    found: list[str | None] = []
    for _ in range(2):  # reused with no reset
        found += run(model, tokenizer, arithmetic, **options)
        trees = run(model, tokenizer, tree, **options)
        assert all(is_tree(t) for t in trees if t is not None)
        found += [None if t is None else "1" for t in trees]
    assert any(found) and all(is_arithmetic(t) for t in found if t is not None)


def test_automata_and_grammars_in_one_batch(model, tokenizer):
    """Also where rows of different constraints have the same tokens."""
    kinds = [Constraint.choice(["red", "blue"]), Constraint.grammar(ARITHMETIC), Constraint.json_schema(TREE)]
    processor = ConstraintLogitsProcessor([*kinds, Constraint.regex("[0-9]{2}")], tokenizer)
    checks = [lambda t: t in ("red", "blue"), is_arithmetic, is_tree, lambda t: len(t) == 2 and t.isdigit()]
    same = torch.tensor([[11, 12, 13, 14, 15]] * 4)
    for ids in (same, same, None):
        for options in ({"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}, {"num_beams": 2}):
            found = run(model, tokenizer, processor, prompts=4, ids=ids, **options)
            each = len(found) // 4
            for i, text in enumerate(found):
                assert text is None or checks[i // each](text), (i, text)


def test_rows_of_two_automata_with_equal_prompts_keep_their_own(model, tokenizer):
    processor = ConstraintLogitsProcessor([Constraint.regex("a{3}"), Constraint.regex("[0-9]{2}")], tokenizer)
    first, second = run(model, tokenizer, processor, ids=torch.tensor([[11, 12, 13, 14, 15]] * 2))
    assert first == "aaa" and len(second) == 2 and second.isdigit()


def allowed_by(processor, rows: list[list[int]], width: int) -> list[set[int]]:
    masked = processor(torch.tensor(rows), torch.zeros(len(rows), width))
    return [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in masked]


def test_rows_may_be_permuted_repeated_and_taken_back(tokenizer, arithmetic):
    """As beams and assisted decoding do: each row's mask is that of its own text."""
    width, prompt = len(tokenizer) + 5, [[40, 41], [42, 43]]
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    grammar = compiled(Constraint.grammar(ARITHMETIC), vocabulary)
    ids = {c: tokenizer.convert_tokens_to_ids(c) for c in "1(+)"}

    def expected(text: str) -> set[int]:
        matcher = grammar.matcher()
        matcher.move_to([ids[c] for c in text])
        return allowed(matcher)

    def rows(*texts: tuple[int, str]) -> list[list[int]]:
        return [prompt[p] + [ids[c] for c in text] for p, text in texts]

    start = allowed_by(arithmetic, rows((0, ""), (1, "")), width)
    assert start[0] == start[1] == expected("")
    steps = [((0, "1"), (1, "(")), ((1, "(1"), (1, "(("), (0, "1+")), ((1, "((("), (0, "1+1"), (1, "(1)"), (1, "(1+"))]
    for step in [*steps, steps[1], steps[2]]:
        assert allowed_by(arithmetic, rows(*step), width) == [expected(text) for _, text in step]


def test_several_ends_of_sequence(model, tokenizer):
    eos = [tokenizer.eos_token_id, 777]
    processor = GrammarLogitsProcessor('start: "x" | "y" start', tokenizer, eos_token_ids=eos)
    step = torch.tensor([[9, tokenizer.convert_tokens_to_ids("x")]])
    processor(step[:, :1], torch.zeros(1, len(tokenizer)))
    assert torch.isfinite(processor(step, torch.zeros(1, len(tokenizer)))[0]).nonzero().flatten().tolist() == sorted(
        eos
    )
    texts = run(model, tokenizer, processor, eos_token_id=eos, do_sample=True, temperature=5.0, num_return_sequences=5)
    assert all(t.strip("y") == "x" for t in texts if t is not None) and any(texts)


def test_the_constraint_wins_over_min_new_tokens(model, tokenizer):
    found = run(model, tokenizer, GrammarLogitsProcessor('start: "yes" | "no"', tokenizer), min_new_tokens=12)
    assert all(t in ("yes", "no") for t in found)


def test_keywords_of_a_patched_generate_and_the_pipeline(model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    ids = torch.randint(10, 200, (2, 5))
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 3.0}
    with hf_accel.patch(model):
        rows = model.generate(ids, grammar=ARITHMETIC, tokenizer=tokenizer, pad_token_id=0, **options)[:, 5:].tolist()
        with pytest.raises(StructureError, match="unknown name"):
            model.generate(ids, grammar="start: foo", tokenizer=tokenizer)
    texts = [tokenizer.decode(r[: r.index(tokenizer.eos_token_id)]) for r in rows if tokenizer.eos_token_id in r]
    pipe = hf_accel.AcceleratedPipeline(model=model, tokenizer=tokenizer)
    for answer in pipe(["def f(", "class"], grammar='start: "a" start | "b"', return_full_text=False, **options):
        text = answer[0]["generated_text"]
        assert text in ("a" * 40, "a" * (len(text) - 1) + "b")
    assert texts and all(map(is_arithmetic, texts))
