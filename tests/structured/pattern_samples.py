"""Random patterns in Python's grammar, small tokenizers, and vocabularies to run them over."""

from __future__ import annotations

import random
import re

from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_accel.structured.vocabulary import Vocabulary

CHARS = "ab01 .-_\néß漢😀"
CLASSES = [r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "."]
SETS = ["[ab]", "[^a]", "[a-c0-9]", r"[^\W\d]", r"[\s._-]", "[é-漢]", r"[^\n😀]", r"[\]\\^a]", "[😀-😎]", "[a-]"]
FOLDED = ["(?i:K)", "(?i:[a-k]é)"]  # few: each asks `re` about every character
ESCAPES = [r"\x61", r"\u6f22", r"\U0001f600", r"\101", r"\.", r"\n", r"\-"]
BOUNDED = ["?", "??", "{2}", "{0,2}", "{1,3}?", "{,2}", "{3}"]
OPEN = ["*", "+", "*?", "+?", "{2,}", "{1,}?"]
GROUPS = ["(?:{})", "({})", "(?s:{})", "(?-s:{})", "(?P<g{}>{})", "(?a:{})"]


def quiet(examples: int) -> settings:
    """So many examples, however long each takes."""
    return settings(deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck))


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """One that `re` compiles and a finite automaton can decide; only one repetition on each way down is without a bound, so that
    `re` decides in time too. Matches something."""
    whole = _Grammar(rng).pattern(depth, True)
    whole = rng.choice(["{}", "{}", "^{}$", r"\A{}", "(?s){}", "(?x) {} # as it is"]).format(f"(?:{whole})")
    re.compile(whole)
    return whole


class _Grammar:
    def __init__(self, rng: random.Random) -> None:
        self.rng, self.names = rng, 0

    def pattern(self, depth: int, may_be_open: bool) -> str:
        rng = self.rng
        if depth == 0 or rng.random() < 0.2:
            return self.atom()
        kind = rng.choice(["seq", "seq", "alt", "repeat", "group"])
        if kind == "seq":
            return "".join(self.part(depth, may_be_open) for _ in range(rng.randint(2, 3)))
        if kind == "alt":
            return "(?:" + "|".join(self.pattern(depth - 1, may_be_open) for _ in range(rng.randint(2, 3))) + ")"
        if kind == "group":
            return self.group(self.pattern(depth - 1, may_be_open))
        if may_be_open and rng.random() < 0.5:
            return f"(?:{self.pattern(depth - 1, False)}){rng.choice(OPEN)}"
        return f"(?:{self.pattern(depth - 1, may_be_open)}){rng.choice(BOUNDED)}"

    def part(self, depth: int, may_be_open: bool) -> str:
        return f"(?:{self.pattern(depth - 1, may_be_open)})"

    def group(self, inner: str) -> str:
        form = self.rng.choices(GROUPS, [4, 4, 4, 4, 4, 1])[0]
        self.names += 1
        return form.format(self.names, inner) if "P<" in form else form.format(inner)

    def atom(self) -> str:
        rng = self.rng
        kinds = [CLASSES, SETS, ESCAPES, FOLDED]
        if rng.random() < 0.5:
            return "".join(re.escape(rng.choice(CHARS)) for _ in range(rng.randint(1, 3)))
        return rng.choice(rng.choices(kinds, [4, 4, 3, 1])[0])


def byte_level_tokenizer(vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every byte, tokens of many characters, and more than one special token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rng = random.Random(0)
    texts = ["".join(rng.choices(CHARS, k=9)) for _ in range(300)] + [
        '{"name": "ab", "n": 12.5, "x": null}, [true]'
    ] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<pad>", "<|im_end|>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's way: a metaspace for blanks, bytes as tokens of their own, the first blank stripped."""
    letters = [*"abcdefgnrstuy01.-_é漢", "\u2581", "\u2581a", "ab", "\u2581b", "yes", "\u2581\u2581"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581", "b"), ("\u2581", "\u2581")]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def random_vocabulary(rng: random.Random, *, every_byte: bool) -> Vocabulary:
    """Some pieces of texts, parts of characters, specials and unused ids; with or without a token for each byte."""
    single = [bytes([b]) for b in range(256)] if every_byte else [c.encode() for c in rng.sample(CHARS, 6)]
    words = ["".join(rng.choices(CHARS, k=rng.randint(1, 4))).encode() for _ in range(30)]
    parts = [w[rng.randint(0, 1) :][: rng.randint(1, 5)] for w in words]
    tokens: list[bytes | None] = [*single, *words, *(p for p in parts if p), None, None, None]
    rng.shuffle(tokens)
    unused = [i for i, t in enumerate(tokens) if t is None]
    return Vocabulary((*tokens, None), tuple(unused[:2]))
