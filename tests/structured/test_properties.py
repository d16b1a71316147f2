"""What every constraint must hold, on random patterns, vocabularies and texts. Test names carry the property:
s: sound, c: complete, l: alive, r: robust. Those of batches and of `generate` are in `test_generate_properties.py`.
"""

from __future__ import annotations

import datetime
import random
import re
import threading

import numpy as np
import pytest
import regex
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_accel.structured.automaton import ByteDfa, compile_node
from hf_accel.structured.compiler import ConstraintCompiler
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.mask_table import DONE, FREE, MaskTable
from hf_accel.structured.nfa import DEAD
from hf_accel.structured.regex import parse_regex
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.token_fsm import TokenFsm, compile_fsm
from hf_accel.structured.vocabulary import Vocabulary

from .pattern_samples import byte_level_tokenizer, quiet, random_pattern, random_vocabulary, sentencepiece_tokenizer
from .samples import random_text

SEEDS = st.integers(0, 1 << 40)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return Vocabulary.of(tokenizer, len(tokenizer) + 9, [tokenizer.eos_token_id, len(tokenizer) - 1])


def compiled(pattern: str) -> ByteDfa:
    return compile_node(parse_regex(pattern))


def random_way(fsm: TokenFsm, vocabulary: Vocabulary, rng: random.Random, most: int = 8) -> tuple[int, int, bytes]:
    """(state, count, bytes) after some allowed tokens."""
    state, count, made = fsm.start, 0, b""
    for _ in range(rng.randint(0, most)):
        choices = [t for t in fsm.allowed(state, count).tolist() if vocabulary.tokens[t] is not None]
        if not choices:
            break
        token_id = rng.choice(choices)
        state, count = fsm.advance(state, token_id, count)
        made += vocabulary.tokens[token_id]
    return state, count, made


# ---- sound -----------------------------------------------------------------------------------------------------------


@given(SEEDS)
@quiet(12)
def test_s1_whatever_is_chosen_matches_when_it_ends(vocabulary, seed):
    """Random choices to the end, closed by the shortest way: strictly decoded from bytes, by `re.fullmatch`."""
    rng = random.Random(seed)
    pattern = random_pattern(rng)
    fsm = compile_fsm(compiled(pattern), vocabulary)
    for _ in range(3):
        state, count, made = random_way(fsm, vocabulary, rng)
        while state != DONE:
            after = {t: fsm.advance(state, t, count) for t in fsm.allowed(state, count).tolist()}
            nearest = min(fsm.distances.at(*a) for a in after.values())
            token_id = rng.choice([t for t, a in after.items() if fsm.distances.at(*a) == nearest])
            state, count = after[token_id]
            made += vocabulary.tokens[token_id] or b""
        assert re.fullmatch(pattern, made.decode()), (pattern, made)


@given(SEEDS)
@quiet(14)
def test_s3_an_end_is_allowed_where_the_text_matches_and_no_special_token_anywhere(vocabulary, seed):
    rng = random.Random(seed)
    pattern = random_pattern(rng)
    fsm = compile_fsm(compiled(pattern), vocabulary)
    nothing = {i for i, t in enumerate(vocabulary.tokens) if t is None} - set(vocabulary.eos_token_ids)
    assert len(nothing) > 9
    for _ in range(6):
        state, count, made = random_way(fsm, vocabulary, rng)
        allowed = set(fsm.allowed(state, count).tolist())
        try:
            complete = re.fullmatch(pattern, made.decode()) is not None
        except UnicodeDecodeError:
            complete = False
        ends = set(vocabulary.eos_token_ids)
        assert allowed & ends == (ends if complete else set()), (pattern, made)
        assert not allowed & nothing


@pytest.mark.parametrize("tail", ["-02-29", "-02-28", "-12-31"])
def test_s1_dates_are_those_of_the_calendar(tail):
    dfa = Constraint.json_schema({"type": "string", "format": "date"}).compile()
    for year in (
        0,
        1,
        4,
        9,
        10,
        99,
        100,
        400,
        1000,
        1900,
        2000,
        2024,
        2100,
        9996,
        9999,
        *random.sample(range(10000), 200),
    ):
        text = f"{year:04}{tail}"
        try:
            expected = datetime.date.fromisoformat(text) is not None
        except ValueError:
            expected = False
        assert dfa.accepts(f'"{text}"'.encode()) == expected, text


# ---- complete --------------------------------------------------------------------------------------------------------


def accepts(fsm: TokenFsm, token_ids: list[int], eos: int) -> bool:
    state, count = fsm.start, 0
    for token_id in [*token_ids, eos]:
        if token_id not in fsm.allowed(state, count):
            return False
        state, count = fsm.advance(state, token_id, count)
    return state == DONE


def segmentations(tokens: dict[bytes, list[int]], text: bytes, rng: random.Random) -> list[list[int]]:
    """Byte by byte, and two at random."""
    found = [[rng.choice(tokens[text[i : i + 1]]) for i in range(len(text))]]
    for _ in range(2):
        ids, at = [], 0
        while at < len(text):
            end = rng.choice([e for e in range(at + 1, min(at + 20, len(text)) + 1) if text[at:e] in tokens])
            ids.append(rng.choice(tokens[text[at:end]]))
            at = end
        found.append(ids)
    return found


def by_bytes(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    tokens: dict[bytes, list[int]] = {}
    for i, token in enumerate(vocabulary.tokens):
        if token is not None:
            tokens.setdefault(token, []).append(i)
    return tokens


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
@given(SEEDS)
@quiet(12)
def test_c1_every_segmentation_of_a_match_is_accepted(make, seed):
    tokenizer, rng = _kept(make), random.Random(seed)
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    tokens = by_bytes(vocabulary)
    pattern = random_pattern(rng)
    dfa = compiled(pattern)
    fsm = compile_fsm(dfa, vocabulary)
    for _ in range(4):
        text = random_text(dfa, rng, budget=12)
        assert re.fullmatch(pattern, text.decode())
        canonical = tokenizer.encode(text.decode(), add_special_tokens=False)
        if (
            b"".join(vocabulary.tokens[i] or b"\0" for i in canonical) == text
        ):  # SentencePiece may put a blank before it
            assert accepts(fsm, canonical, tokenizer.eos_token_id), (pattern, text)
        for ids in segmentations(tokens, text, rng):
            assert accepts(fsm, ids, tokenizer.eos_token_id), (pattern, text, ids)


_tokenizers = {}


def _kept(make):
    if make not in _tokenizers:
        _tokenizers[make] = make()
    return _tokenizers[make]


@given(SEEDS)
@quiet(14)
def test_c2_masks_equal_brute_force(seed):
    """Over whole characters `regex`'s partial matching is the judge; over parts of them, the byte automaton."""
    rng = random.Random(seed)
    vocabulary, pattern = random_vocabulary(rng, every_byte=True), random_pattern(rng)
    dfa = compiled(pattern)
    fsm = compile_fsm(dfa, vocabulary)
    judge = regex.compile(re.sub(r"([*+?}])\?", r"\1", pattern))  # partial matches go wrong behind lazy repetitions
    for _ in range(4):
        state, count, made = random_way(fsm, vocabulary, rng, most=4)
        allowed = set(fsm.allowed(state, count).tolist())
        for token_id, token in enumerate(vocabulary.tokens):
            if token is None:
                continue
            at = dfa.walk(made + token)
            assert (token_id in allowed) == (at != DEAD), (pattern, made, token)
            text = _text(made + token)
            if text is not None and not _judged_otherwise(pattern):
                expected = judge.fullmatch(text, partial=True) is not None
                assert (token_id in allowed) == expected, (pattern, text)


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _judged_otherwise(pattern: str) -> bool:
    """`regex` has other members of classes, folds case in full, and does not carry inline flags as `re` does."""
    return any(part in pattern for part in (r"\w", r"\W", r"\s", r"\S", "(?i", "(?a", "[a-]", "(?x)"))


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_c3_characters_may_be_split_over_tokens_and_only_there(make):
    tokenizer = _kept(make)
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    tokens, eos = by_bytes(vocabulary), tokenizer.eos_token_id
    fsm = compile_fsm(compiled("[😀-😂漢]{2}"), vocabulary)
    for text in ("😀漢", "漢漢", "😂😀"):
        single = [tokens[bytes([b])][0] for b in text.encode()]
        assert accepts(fsm, single, eos)
        state = fsm.start
        for token_id, byte in zip(single, text.encode(), strict=True):
            allowed = {vocabulary.tokens[i] for i in fsm.allowed(state).tolist()}
            inside = byte & 0xC0 == 0x80
            # What begins within a character comes only where one has begun.
            assert all((token[0] & 0xC0 == 0x80) == inside for token in allowed if token is not None)
            state, _ = fsm.advance(state, token_id)
    last_of_another = tokens[bytes(["😃".encode()[-1]])][0]
    state = fsm.start
    for byte in "😀".encode()[:-1]:
        state, _ = fsm.advance(state, tokens[bytes([byte])][0])
    assert last_of_another not in fsm.allowed(state)


# ---- alive -----------------------------------------------------------------------------------------------------------


@given(SEEDS)
@quiet(14)
def test_l1_every_state_that_is_reached_has_a_way_to_the_end(seed):
    """Also where the vocabulary has no token for some bytes: dead ends are pruned, and no more than these."""
    rng = random.Random(seed)
    vocabulary, pattern = random_vocabulary(rng, every_byte=rng.random() < 0.2), random_pattern(rng, depth=2)
    dfa = compiled(pattern)
    alive = set(np.flatnonzero(dfa.accepting).tolist())
    before = -1
    while before != len(alive):
        before = len(alive)
        alive |= {s for s in range(dfa.num_states) if any(dfa.walk(t, s) in alive for t in vocabulary.tokens if t)}
    if 0 not in alive:
        with pytest.raises(StructureError, match="no tokens"):
            compile_fsm(dfa, vocabulary)
        return
    fsm = compile_fsm(dfa, vocabulary)
    reached, states = {(fsm.start, 0)}, {(fsm.start, 0): 0}
    todo = [(fsm.start, 0)]
    for at in todo:
        allowed = fsm.allowed(*at).tolist()
        expected = {i for i, t in enumerate(vocabulary.tokens) if t is not None and dfa.walk(t, states[at]) in alive}
        expected |= set(vocabulary.eos_token_ids) if dfa.accepting[states[at]] else set()
        assert set(allowed) == expected and allowed, (pattern, at)
        assert fsm.distances.at(*at) < 1 << 20
        for token_id in allowed:
            after = fsm.advance(at[0], token_id, at[1])
            if after[0] != DONE and after not in reached:
                reached.add(after)
                states[after] = dfa.walk(vocabulary.tokens[token_id], states[at])
                todo.append(after)


@given(SEEDS)
@quiet(1)
def test_l2_no_row_of_many_automata_is_left_without_a_token(vocabulary, seed):
    """64 automata in one arena, free rows between them, rows that have ended and go on with anything: each as if alone."""
    rng = random.Random(seed)
    fsms = [_few(i, vocabulary) for i in range(64)]
    table = MaskTable(vocabulary.size, vocabulary.eos_token_ids, CPU)
    states = torch.tensor([FREE if i % 9 == 8 else table.start(fsm) for i, fsm in enumerate(fsms)])
    hosts = [(fsm.start, 0) for fsm in fsms]
    for _ in range(12):
        logits = torch.randn(64, vocabulary.size + 3)
        masked = table.masked(logits, states)
        assert torch.equal(masked[8::9], logits[8::9]) and bool((masked.amax(dim=1) > -torch.inf).all())
        chosen = (masked / 5).softmax(dim=-1).multinomial(1)[:, 0]
        for i, fsm in enumerate(fsms):
            if i % 9 == 8:
                continue
            found = torch.isfinite(masked[i]).nonzero().flatten().tolist()
            assert found == fsm.allowed(*hosts[i]).tolist()
            if hosts[i][0] == DONE:
                chosen[i] = rng.randrange(vocabulary.size)  # padding, say
            else:
                hosts[i] = fsm.advance(hosts[i][0], int(chosen[i]), hosts[i][1])
        states = table.advance(states, chosen)


_cases: dict[int, TokenFsm] = {}


def _few(index: int, vocabulary: Vocabulary) -> TokenFsm:
    if index not in _cases:
        if index % 16 == 0:
            counted = Constraint.json_schema({"type": "string", "minLength": index % 5, "maxLength": 20 + index})
            _cases[index] = compile_fsm(counted.compile(), vocabulary)
        else:
            _cases[index] = compile_fsm(compiled(random_pattern(random.Random(index), depth=2)), vocabulary)
    return _cases[index]


# ---- robust ----------------------------------------------------------------------------------------------------------


def test_r1_threads_compile_different_constraints_at_once(vocabulary, tmp_path):
    compiler = ConstraintCompiler(vocabulary, tmp_path)
    patterns = [f"[ab]{{{i}}}c?" for i in range(1, 7)] + ["(?=a)"]
    found: dict[tuple[int, str], object] = {}

    def work(thread: int) -> None:
        for pattern in random.Random(thread).sample(patterns, len(patterns)):
            try:
                found[thread, pattern] = compiler.compile(Constraint.regex(pattern))
            except StructureError as error:
                found[thread, pattern] = str(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, pattern in enumerate(patterns[:-1], start=1):
        assert len({id(found[t, pattern]) for t in range(4)}) == 1
        assert found[0, pattern].distances.needed >= 2 and compiled(pattern).accepts(b"a" * i)
    assert all("lookahead" in found[t, patterns[-1]] for t in range(4))


def test_r2_caches_know_tokenizers_by_their_content(tmp_path):
    """Two vocabularies of one size, two of one content, and two ends of sequence."""
    letters = [bytes([b]) for b in b"abcdef"]
    first = Vocabulary((*letters, None, None), (6,))
    other = Vocabulary((*letters[::-1], None, None), (6,))
    longer_end = Vocabulary((*letters, None, None), (6, 7))
    constraint = Constraint.regex("ab")
    made = [ConstraintCompiler(v, tmp_path).compile(constraint) for v in (first, other, longer_end, first)]
    assert [f.allowed(f.start).tolist() for f in made] == [[0], [5], [0], [0]]
    assert [f.allowed(0).tolist() for f in made] == [[6], [6], [6, 7], [6]]
    assert len(list(tmp_path.iterdir())) == 3
    again = Vocabulary((*letters, None, None), (6,))
    assert again.digest == first.digest
