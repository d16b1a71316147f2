"""Byte-level BPE tokenizers of the sizes that are measured, trained once on text of the machine and kept in a folder.

One training serves all sizes: of the same text, a smaller vocabulary is the beginning of a larger one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.structured_parts.corpus import texts

SIZES = (8192, 32000, 128000)
CORPUS_BYTES = 110 << 20
RECIPE = 1  # of the file names: another text or another trainer is another number
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 cuts text before it looks for merges."""


def load(
    size: int,
    folder: Path,
    largest: int = max(SIZES),
    corpus_bytes: int = CORPUS_BYTES,
    sources: Sequence[Path] = (),
) -> Any:
    """A tokenizer with exactly so many ids, specials included.

    Args:
        size: of the vocabulary.
        folder: where trained files are kept.
        largest: size of the vocabulary that is trained if the file is not there.
        corpus_bytes: of text to train on.
        sources: folders of text, by default those of `corpus.texts`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / f"bpe_{largest}_{corpus_bytes >> 10}k_{RECIPE}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = train(largest, corpus_bytes, sources)
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)
    description = cut(json.loads(path.read_text()), size)
    begin, end, pad = SPECIAL
    tokenizer = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad)


def train(size: int, corpus_bytes: int, sources: Sequence[Path] = ()) -> str:
    """The JSON text of a tokenizer trained on the machine's text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus_bytes, sources), trainer)
    return tokenizer.to_str()


def cut(description: dict[str, Any], size: int) -> dict[str, Any]:
    """The first `size` ids of a trained tokenizer, and the merges that make them.

    Raises:
        ValueError: it has fewer.
    """
    model = description["model"]
    if len(model["vocab"]) < size:
        raise ValueError(f"the text on this machine gave {len(model['vocab'])} tokens, not {size}: use smaller --sizes")
    vocab = {token: i for token, i in model["vocab"].items() if i < size}
    merges = [pair for pair in model["merges"] if _joined(pair) in vocab]
    return {**description, "model": {**model, "vocab": vocab, "merges": merges}}


def _joined(pair: str | Sequence[str]) -> str:
    return "".join(pair.split(" ") if isinstance(pair, str) else pair)
