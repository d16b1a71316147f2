"""Token bytes against what tokenizers decode, and the trie against the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hf_accel
from hf_accel.structured.syntax import StructureError
from hf_accel.structured.vocabulary import TokenTrie, Vocabulary, expand

TEXTS = ["Once upon a time, there was", "naïve café 漢字 \U0001f600!", "tabs\tand\nlines  and   spaces", ""]


def sentencepiece() -> PreTrainedTokenizerFast:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        *"abcdefghinoprstuvwm",
        "\u2581th",
        "er",
    ]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(Path(hf_accel.__file__).parent / "demo_model")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_join_to_the_text(make, text):
    tokenizer = make()
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer) + 5, [tokenizer.eos_token_id])
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(vocabulary.tokens[i] for i in ids)
    assert joined.decode().removeprefix(" " if make is sentencepiece else "") == text


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_specials_and_padding_stand_for_nothing(make):
    tokenizer = make()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer) + 5, [tokenizer.eos_token_id])
    assert vocabulary.size == len(tokenizer) + 5
    assert all(t is None for t in vocabulary.tokens[len(tokenizer) :])
    assert all(vocabulary.tokens[i] is None for i in tokenizer.all_special_ids)
    assert vocabulary.tokens[tokenizer.convert_tokens_to_ids("<tool>")] == b"<tool>"
    assert Vocabulary.of(tokenizer, len(tokenizer) + 6, [tokenizer.eos_token_id]).digest != vocabulary.digest


def test_an_unknown_decoder_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(StructureError, match="WordPiece"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend), 2, [])
    with pytest.raises(StructureError, match="fast tokenizer"):
        Vocabulary.of(object(), 2, [])


def test_trained_byte_level_tokens_cover_every_byte():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [])
    assert {bytes([b]) for b in range(256)} <= set(vocabulary.tokens)


def test_trie_spells_each_token_once():
    tokens = [bytes(np.random.default_rng(i).integers(0, 3, size=i % 6, dtype=np.uint8)) or None for i in range(200)]
    trie = TokenTrie(tokens)
    paths = [b""]
    for node in range(1, trie.num_nodes):
        paths.append(paths[trie.parent[node]] + bytes([trie.byte[node]]))
    assert len(set(paths)) == len(paths)
    assert [len(p) for p in paths] == [n for n in range(len(trie.levels) - 1) for _ in range(*trie.levels[n : n + 2])]
    found = dict(zip(trie.token.tolist(), (paths[n] for n in trie.node), strict=True))
    assert found == {i: t for i, t in enumerate(tokens) if t is not None}
    assert set(paths) == {t[:n] for t in tokens if t for n in range(len(t) + 1)}


def test_a_vocabulary_is_read_once_until_its_tokenizer_changes():
    tokenizer = byte_level()
    eos = [tokenizer.eos_token_id]
    first = Vocabulary.of(tokenizer, 5000, eos)
    assert Vocabulary.of(tokenizer, 5000, eos) is first
    assert Vocabulary.of(tokenizer, 5001, eos) is not first
    assert Vocabulary.of(byte_level(), 5000, eos) is not first
    tokenizer.add_tokens(["<tool>"])
    assert Vocabulary.of(tokenizer, 5000, eos).tokens != first.tokens
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert Vocabulary.of(tokenizer, 5000, eos).tokens == first.tokens


def test_characters_that_stand_for_no_byte_are_themselves():
    """What a byte-level decoder's alphabet lacks, below and above U+00FF."""
    pieces = ["a", "\u0120b", "x y", "\u00ad", "\u6f22\u0120", "\u0143", "\u0144"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend), len(pieces), [])
    expected = [b"a", b" b", b"x y", "\u00ad".encode(), "\u6f22 ".encode(), b"\xad", "\u0144".encode()]
    assert list(vocabulary.tokens) == expected


def test_expand():
    first = np.array([0, 2, 2, 5])
    owner, entry = expand(first, np.array([2, 1, 0, 2]))
    assert owner.tolist() == [0, 0, 0, 2, 2, 3, 3, 3] and entry.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
