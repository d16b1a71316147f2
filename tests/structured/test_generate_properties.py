"""What constraints must hold within HF's `generate`, whatever else a call asks for: see `test_properties.py`."""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import hf_accel
from hf_accel.structured.automaton import compile_node
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.logits_processor import (
    ChoiceLogitsProcessor,
    ConstraintLogitsProcessor,
    RegexLogitsProcessor,
)
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.vocabulary import Vocabulary

from ..tiny import make_tiny_llama
from .pattern_samples import byte_level_tokenizer, sentencepiece_tokenizer

PATTERN = r"(ab|[0-9é]{1,2}-){2,5}漢?\."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make(tokenizer)


def make(tokenizer, **overrides):
    model = make_tiny_llama(vocab_size=len(tokenizer) + 7, **overrides)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, 1
    return model


def run(model, tokenizer, processor, ids=None, **options) -> list[bytes]:
    """Bytes of the rows, which must all have ended."""
    ids = torch.randint(10, 200, (2, 5)) if ids is None else ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, **options}
    outputs = model.generate(ids, logits_processor=[processor], **options)
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    rows = [row[: row.index(tokenizer.eos_token_id)] for row in outputs[:, ids.shape[1] :].tolist()]
    return [b"".join(vocabulary.tokens[t] for t in row) for row in rows]  # no special token on the way


INTERPLAY = [
    {"min_new_tokens": 30},
    {"min_length": 30},
    {"bad_words_ids": [[i] for i in range(3, 300)]},
    {"suppress_tokens": list(range(3, 420))},
    {"begin_suppress_tokens": list(range(3, 420))},
    {"sequence_bias": [[[i], -30.0 if i % 2 else 30.0] for i in range(3, 400)]},
    {"no_repeat_ngram_size": 1},
    {"repetition_penalty": 50.0},
    {"remove_invalid_values": True, "do_sample": True, "temperature": 5.0},
    {"renormalize_logits": True, "do_sample": True, "temperature": 5.0},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_p": 1e-6, "temperature": 5.0},
    {"do_sample": True, "min_p": 0.999},
    {"do_sample": True, "typical_p": 0.01},
    {"do_sample": True, "epsilon_cutoff": 0.9},
    {"do_sample": True, "eta_cutoff": 0.9},
    {"exponential_decay_length_penalty": (2, 9.0)},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    {"num_beams": 4, "do_sample": True, "temperature": 5.0, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 5.0, "num_return_sequences": 5},
    {"forced_eos_token_id": 0},
]


@pytest.mark.parametrize("patched", [False, True])
def test_whatever_else_a_call_asks_for_the_constraint_holds(tokenizer, patched):
    model = make(tokenizer)
    if patched:
        hf_accel.patch(model)
    processor = RegexLogitsProcessor(PATTERN, tokenizer, max_new_tokens=40)
    for options in INTERPLAY:
        for made in run(model, tokenizer, processor, **options):
            assert re.fullmatch(PATTERN, made.decode()), (options, made)


def test_left_padding_and_mixed_lengths(model, tokenizer):
    ids = torch.randint(10, 200, (3, 7))
    mask = torch.ones_like(ids)
    for row, length in ((0, 3), (2, 1)):
        ids[row, :-length], mask[row, :-length] = 1, 0
    processor = RegexLogitsProcessor(PATTERN, tokenizer, max_new_tokens=30)
    together = run(model, tokenizer, processor, ids, attention_mask=mask, max_new_tokens=30)
    assert all(re.fullmatch(PATTERN, made.decode()) for made in together)
    for row, length in ((0, 3), (1, 7), (2, 1)):
        assert run(model, tokenizer, processor, ids[row : row + 1, -length:], max_new_tokens=30) == [together[row]]


@pytest.mark.parametrize("patched", [False, True])
def test_assisted_decoding_answers_as_without(model, tokenizer, patched):
    """Calls come with lengths that jump ahead and fall back; both models share the processor."""
    torch.manual_seed(4)
    assistant = make(tokenizer, num_hidden_layers=1)
    if patched:
        hf_accel.patch(model)
    processor = RegexLogitsProcessor(PATTERN, tokenizer, max_new_tokens=25)
    for length in (4, 9):
        ids = torch.randint(10, 200, (1, length))
        plain = run(model, tokenizer, processor, ids, max_new_tokens=25)
        for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            assert run(model, tokenizer, processor, ids, max_new_tokens=25, **options) == plain
        [sampled] = run(model, tokenizer, processor, ids, assistant_model=assistant, do_sample=True, max_new_tokens=25)
        assert re.fullmatch(PATTERN, sampled.decode())


def test_stop_strings_within_the_grammar(model, tokenizer):
    processor = RegexLogitsProcessor("[a-c]{30}", tokenizer)
    ids = torch.randint(10, 200, (1, 4))
    outputs = model.generate(
        ids, max_new_tokens=40, logits_processor=[processor], stop_strings=["b", "cc"], tokenizer=tokenizer,
        do_sample=True, temperature=5.0, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    made = tokenizer.decode(outputs[0, 4:])
    assert re.fullmatch("[a-c]{1,30}(<eos>)?", made) and ("b" in made or "cc" in made or made.endswith("<eos>"))


@pytest.mark.parametrize("make_scores", [
    lambda n, v: torch.randn(v, n).t(),
    lambda n, v: torch.randn(n, 2 * v)[:, ::2],
    lambda n, v: torch.randn(n, v + 3)[:, 2:-1],
    lambda n, v: torch.randn(n, v).bfloat16(),
    lambda n, v: torch.randn(1, v).expand(n, v),
])  # fmt: skip
def test_scores_may_lie_in_memory_as_they_like(tokenizer, make_scores):
    processor = ChoiceLogitsProcessor(["yes", "no"], tokenizer)
    for num_rows in (1, 3, 17):
        scores = make_scores(num_rows, len(tokenizer) + 7)
        before = scores.clone()
        masked = processor(torch.randint(10, 200, (num_rows, 4)), scores)
        assert torch.equal(scores, before) and masked.shape == scores.shape and masked.dtype == scores.dtype
        found = {tokenizer.convert_ids_to_tokens(i) for i in torch.isfinite(masked[-1]).nonzero().flatten().tolist()}
        assert {"y", "n"} <= found <= {"y", "ye", "yes", "n", "no"}
        assert torch.equal(masked[torch.isfinite(masked)], before[torch.isfinite(masked)])


def test_sentencepiece_texts_are_what_follows_the_prompt(tmp_path):
    """`decode` of the output alone drops a leading blank: what counts is what it adds to the prompt."""
    tokenizer = sentencepiece_tokenizer()
    model = make(tokenizer)
    pattern = r" ?(yes|a b|é漢) {0,3}[ab]"
    processor = RegexLogitsProcessor(pattern, tokenizer, max_new_tokens=16)
    prompt = torch.tensor([tokenizer.encode("ab a", add_special_tokens=False)] * 6)
    outputs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=True, temperature=5.0,
        logits_processor=[processor],
    )  # fmt: skip
    before = tokenizer.decode(prompt[0])
    for row in outputs.tolist():
        whole = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
        assert whole.startswith(before) and re.fullmatch(pattern, whole[len(before) :]), whole


def only_letters(model, tokenizer):
    """Makes plain ASCII tokens the only ones with a chance to be the likeliest."""
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer) + 7, [])
    other = [i for i, t in enumerate(vocabulary.tokens) if t is None or not t.isascii()]
    with torch.no_grad():
        model.lm_head.weight[other] = 0
    return model


@pytest.mark.parametrize("patched", [False, True])
def test_a_constraint_that_is_satisfied_anyway_changes_nothing(model, tokenizer, patched):
    only_letters(model, tokenizer)
    if patched:
        hf_accel.patch(model)
    ids = torch.randint(10, 200, (3, 5))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    processor = RegexLogitsProcessor(r"(?s).*", tokenizer)
    free = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, logits_processor=[processor], **options), free)
    text = tokenizer.decode(free[0, 5:12])
    exact = RegexLogitsProcessor(re.escape(text) + r"(?s:.)*", tokenizer)
    assert torch.equal(
        model.generate(ids[:1], logits_processor=[exact], **{**options, "attention_mask": None}), free[:1]
    )


def test_scores_of_generate_are_of_the_allowed_tokens_alone(model, tokenizer):
    processor = RegexLogitsProcessor(PATTERN, tokenizer)
    ids = torch.randint(10, 200, (2, 4))
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, logits_processor=[processor], do_sample=False,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    found = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
    for step, (scores, logits) in enumerate(zip(result.scores, result.logits, strict=True)):
        allowed = torch.isfinite(scores)
        assert bool(allowed.any(dim=1).all()) and not bool(allowed.all())
        chosen = result.sequences[:, 4 + step]
        own = logits.float().masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)
        torch.testing.assert_close(found[:, step], own.gather(1, chosen[:, None])[:, 0])


@given(st.integers(0, 1 << 40))
@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
def test_rows_that_branch_and_return_find_their_states_again(tokenizer, seed):
    """Rows of any history, in any order, with lengths that jump: the mask of each is that of its own text."""
    torch.manual_seed(seed % (1 << 31))
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    processor, dfa = RegexLogitsProcessor("(?s:[ab01é漢]{2,9})|-{4}", tokenizer), compile_node(
        parse_regex("(?s:[ab01é漢]{2,9})|-{4}")
    )  # fmt: skip
    prompt = torch.randint(10, 200, (1, 3))
    rows = prompt.repeat(3, 1)
    for _ in range(8):
        masked = processor(rows, torch.randn(len(rows), len(tokenizer)))
        for row, scores in zip(rows[:, 3:].tolist(), masked, strict=True):
            made = b"".join(vocabulary.tokens[t] or b"" for t in row)
            ended = tokenizer.eos_token_id in row
            expected = {i for i, t in enumerate(vocabulary.tokens) if t and dfa.walk(made + t) != DEAD and not ended}
            expected |= {tokenizer.eos_token_id} if ended or dfa.accepts(made) else set()
            assert set(torch.isfinite(scores).nonzero().flatten().tolist()) == expected, made
        chosen = masked.softmax(dim=-1).multinomial(1)
        grown = torch.cat([rows, chosen], dim=1)
        rows = grown[torch.randint(0, 3, (int(torch.randint(2, 5, ())),)) % len(grown)]
        if bool((rows[:, 3:] == tokenizer.eos_token_id).any(dim=1).all()):
            break  # what follows a call that has ended is another one


def test_equal_prompts_may_have_different_constraints(model, tokenizer):
    processor = ConstraintLogitsProcessor(
        [Constraint.choice(["yes", "no"]), Constraint.regex("[ab]{4}"), Constraint.regex("[0-9]-")], tokenizer
    )
    ids = torch.randint(10, 200, (1, 4)).repeat(3, 1)
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2}):
        found = [made.decode() for made in run(model, tokenizer, processor, ids, **options)]
        each = len(found) // 3
        assert {*found[:each]} <= {"yes", "no"} and all(re.fullmatch("[ab]{4}", t) for t in found[each : 2 * each])
        assert all(re.fullmatch("[0-9]-", t) for t in found[2 * each :])


def test_assistants_may_run_far_ahead(tokenizer):
    """A row is found again however many steps another has made from it."""
    processor, ids = RegexLogitsProcessor("[ab]{90}-", tokenizer), tokenizer.convert_tokens_to_ids
    prompt = torch.randint(10, 200, (1, 4))
    width, rows = len(tokenizer), prompt
    for _ in range(80):
        processor(rows, torch.randn(1, width))
        rows = torch.cat([rows, torch.tensor([[ids(random.choice("ab"))]])], dim=1)
    for kept in (4, 40, 5):  # what the other model takes over, and its own next token
        rows = torch.cat([rows[:, :kept], torch.tensor([[ids("a")]])], dim=1)
        masked = processor(rows, torch.randn(1, width))
        allowed = {tokenizer.convert_ids_to_tokens(i) for i in torch.isfinite(masked[0]).nonzero().flatten().tolist()}
        assert {"a", "b"} <= allowed and all(set(token) <= {"a", "b"} for token in allowed)
