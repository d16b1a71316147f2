"""Incremental text against one full decode, over tokenizers trained here; stop strings against a character-wise oracle."""

from __future__ import annotations

import random
import string

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_accel.engine.detokenizer import IncrementalDetokenizer

TEXTS = [
    "Hello there, this is a test of streaming text. It's fine: isn't it?\n\n\tdef f(x):\n    return x  # done",
    "中文文本解码测试,每个字符可能由多个标记组成。日本語も、한국어도.",
    "emoji 🙂🙃👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 and accents é è ü ñ — “quotes” … ½",
    "The quick brown fox  jumps   over the lazy dog. " * 3,
    'numbers 1 22 333 4444 <tag> </tag> {"json": [1, 2.5e-3, null]}',
]


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _sentencepiece(legacy: bool) -> PreTrainedTokenizerFast:
    """Llama 2's arrangement (`legacy`: normalizer and Strip; else Metaspace), with byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ["▁", *string.ascii_letters, *string.digits, *".,:;'()#[]{}", "é", "中", "文"]:
        vocab[piece] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "t"), ("▁", "▁"), ("e", "r"), ("▁", "H")]
    merges += [("e", "l"), ("▁H", "el"), ("l", "o"), ("中", "文")]
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte-level": _byte_level(),
    "sentencepiece-legacy": _sentencepiece(True),
    "sentencepiece-metaspace": _sentencepiece(False),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def _stream(tokenizer, ids, prompt=(), **kwargs) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt, **kwargs)
    pieces = [detokenizer.push(i) for i in ids]
    pieces.append(detokenizer.flush())
    assert detokenizer.text == "".join(pieces)
    return pieces


def _full(tokenizer, ids, skip=True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(_stream(tokenizer, ids)) == _full(tokenizer, ids)


@pytest.mark.parametrize("text", TEXTS)
def test_continuation_of_a_prompt_cut_anywhere(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = _full(tokenizer, ids)
    for cut in range(1, len(ids)):
        before = max((_full(tokenizer, ids[: cut - n]).rstrip("\ufffd") for n in range(min(cut, 4))), key=len)
        assert whole.startswith(before)
        assert "".join(_stream(tokenizer, ids[cut:], prompt=ids[:cut])) == whole[len(before) :]


def test_random_tokens_of_a_byte_level_tokenizer():
    """Mostly not UTF-8 at all: every replacement character of the full decode must come, and none twice."""
    tokenizer = TOKENIZERS["byte-level"]
    rng = random.Random(1)
    byte_ids = [i for i in range(len(tokenizer)) if "\ufffd" in _full(tokenizer, [i])]
    pools = [range(len(tokenizer)), byte_ids, byte_ids[:3], [*byte_ids[-8:], 40, 0, 1]]
    for trial in range(160):
        ids = rng.choices(pools[trial % 4], k=rng.randrange(1, 150))
        skip = trial % 3 != 0
        assert "".join(_stream(tokenizer, ids, skip_special_tokens=skip)) == _full(tokenizer, ids, skip)


@pytest.mark.parametrize("name", ["sentencepiece-legacy", "sentencepiece-metaspace"])
def test_random_tokens_with_byte_fallback(name):
    """Runs of bytes are whole characters here: an unreadable run is declared so backwards, also what was handed out."""
    tokenizer = TOKENIZERS[name]
    rng = random.Random(2)
    alphabet = "aé中🙂\n😀ß漢"
    for trial in range(120):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 60)):
            if rng.random() < 0.5:
                ids += [3 + byte for byte in rng.choice(alphabet).encode()]
            else:
                ids.append(rng.choice([1, 2, *range(259, len(tokenizer))]))
        skip = trial % 3 != 0
        assert "".join(_stream(tokenizer, ids, skip_special_tokens=skip)) == _full(tokenizer, ids, skip)


@pytest.mark.parametrize("name", ["sentencepiece-legacy", "sentencepiece-metaspace"])
def test_unreadable_bytes_with_byte_fallback_do_no_lasting_harm(name):
    tokenizer = TOKENIZERS[name]
    rng = random.Random(3)
    for _ in range(100):
        noise = rng.choices(range(3, 259), k=rng.randrange(1, 80))
        ids = [*noise, *tokenizer.encode("the Hello 中文 in the end. 🙂 ok", add_special_tokens=False)]
        text = "".join(_stream(tokenizer, ids))
        assert text.endswith("the Hello 中文 in the end. 🙂 ok")
        assert len(text) <= len(ids) + 40


def test_no_unfinished_character_is_shown(tokenizer):
    ids = tokenizer.encode("中文🙂 ok 漢字", add_special_tokens=False)
    assert not any("\ufffd" in piece for piece in _stream(tokenizer, ids))


def test_text_comes_as_early_as_it_can():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("Hello there, this is", add_special_tokens=False)
    assert _stream(tokenizer, ids) == [*[_full(tokenizer, [i]) for i in ids], ""]


def test_prompt_that_ends_in_a_real_replacement_character(tokenizer):
    prompt = tokenizer.encode("the \ufffd", add_special_tokens=False)
    output = tokenizer.encode("the \ufffdend", add_special_tokens=False)[len(prompt) :]
    assert "".join(_stream(tokenizer, output, prompt=prompt)) == "end"


def test_cost_per_token_does_not_grow():
    class Counting:
        longest = total = 0

        def decode(self, token_ids, **kwargs):
            self.longest = max(self.longest, len(token_ids))
            self.total += len(token_ids)
            return inner.decode(token_ids, **kwargs)

    inner = TOKENIZERS["byte-level"]
    unreadable = next(i for i in range(len(inner)) if _full(inner, [i]) == "\ufffd")
    for ids in (inner.encode(TEXTS[1] * 20, add_special_tokens=False), [unreadable] * 2000, [0] * 2000):
        counting = Counting()
        "".join(_stream(counting, ids))
        assert counting.longest <= 65 and counting.total < 150 * len(ids)


# -- stop strings --


def _first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_stop_strings_against_the_oracle(tokenizer):
    rng = random.Random(4)
    for _ in range(150):
        text = "".join(rng.choices("abc 中é🙂", k=rng.randrange(1, 40)))
        stops = tuple({"".join(rng.choices("abc 中🙂", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))})
        ids = tokenizer.encode("a" + text, add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer, stop=stops)
        pieces = [detokenizer.push(i) for i in ids]
        pieces.append(detokenizer.flush())
        expected, by = _first_stop(_full(tokenizer, ids), stops)
        assert ("".join(pieces), detokenizer.finished_by) == (expected, by)
        assert detokenizer.text == expected
        if by is not None:
            assert detokenizer.push(ids[0]) == "" and detokenizer.flush() == ""


class _Characters:
    """Tokens are indices into a list of strings."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, token_ids, **kwargs):
        return "".join(self.pieces[i] for i in token_ids)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "by"),
    [
        (["one", " ST", "OP two"], ("STOP",), ["one", " ", ""], "STOP"),
        (["one STOP two"], ("STOP",), ["one "], "STOP"),
        (["abcd"], ("bcd", "c"), ["ab"], "c"),
        (["ab", "c", "d"], ("bcd", "c"), ["a", "b", ""], "c"),
        (["x", "yz"], ("z", "yz"), ["x", ""], "yz"),
        (["aa", "ab"], ("aab",), ["", "a"], "aab"),
        (["ab", "ac"], ("abd",), ["", "abac"], None),
    ],
)
def test_stop_string_cases(pieces, stops, expected, by):
    detokenizer = IncrementalDetokenizer(_Characters(*pieces), stop=stops)
    got = []
    for i in range(len(pieces)):
        got.append(detokenizer.push(i))
    assert got == expected
    assert detokenizer.flush() == ""
    assert detokenizer.finished_by == by


def test_stop_must_not_be_empty():
    with pytest.raises(ValueError, match="non-empty"):
        IncrementalDetokenizer(_Characters("a"), stop=("x", ""))
