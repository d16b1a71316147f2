"""What bytes each token id stands for, read from a tokenizer's own decoder, and the trie of these byte strings.

Owns the reading of byte-level BPE, SentencePiece (with byte fallback) and plain vocabularies. Special tokens and ids without a
token stand for nothing: they are never allowed by a constraint, except an end of sequence where it may end.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hf_accel.structured.syntax import StructureError

_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[Any, dict[Any, Vocabulary]] = weakref.WeakKeyDictionary()  # by tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token bytes of one tokenizer, for logits of one width.

    Attributes:
        tokens: of each id below the width of the logits, its bytes; None for special, unused and padded ids.
        eos_token_ids: ids that end a generation.
    """

    tokens: tuple[bytes | None, ...]
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int]) -> Vocabulary:
        """The vocabulary of a HF tokenizer; the same object for as long as the tokenizer does not change.

        Args:
            tokenizer: a fast tokenizer (one with a `backend_tokenizer`).
            vocab_size: width of the logits.
            eos_token_ids: ids that end a generation.

        Raises:
            StructureError: its decoder is of a kind whose bytes are not known.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise StructureError("structured output needs a fast tokenizer (one with a backend_tokenizer)")
        eos = tuple(sorted(set(eos_token_ids)))
        added = backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} | {
            *getattr(tokenizer, "all_special_ids", ()),
            *eos,
        }
        decoder = b"" if backend.decoder is None else backend.decoder.__getstate__()
        key = (vocab_size, eos, decoder, tuple(sorted(special)), tuple(sorted(added)), backend.get_vocab_size())
        with _lock:
            known = _known.setdefault(tokenizer, {}) if _may_be_known(tokenizer) else {}
            if key not in known:
                known[key] = cls(_tokens_of(backend, vocab_size, special, decoder), eos)
            return known[key]

    @property
    def size(self) -> int:
        """Width of the logits."""
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        """Of everything that a compiled constraint depends on."""
        lengths = np.array([-1 if token is None else len(token) for token in self.tokens], dtype=np.int32)
        state = hashlib.sha256(repr((self.size, self.eos_token_ids)).encode())
        state.update(lengths.tobytes())
        state.update(b"".join(filter(None, self.tokens)))
        return state.hexdigest()

    @cached_property
    def trie(self) -> TokenTrie:
        """The tokens' byte strings as a trie."""
        return TokenTrie(self.tokens)


class TokenTrie:
    """Byte strings that begin alike share their way. Node 0 is the root; nodes are in the order of their lengths.

    Attributes:
        parent: [num_nodes] int32, 0 for the root.
        byte: [num_nodes] uint8, the last byte of each node's string.
        levels: where the nodes of each length begin, and where the last ones end.
        token: [num_tokens] int64, ids of the tokens, by node.
        node: [num_tokens] int64, the node at which each of them ends.
    """

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        ids = np.array([i for i, token in enumerate(tokens) if token], dtype=np.int64)
        spelled = [token for token in tokens if token]
        text = np.frombuffer(b"".join(spelled), dtype=np.uint8)
        lengths = np.fromiter(map(len, spelled), dtype=np.int64, count=len(spelled))
        begins = np.cumsum(lengths) - lengths
        parents, last_bytes, self.levels = [np.zeros(1, np.int64)], [np.zeros(1, np.uint8)], [0, 1]
        node, longer = np.zeros(len(ids), dtype=np.int64), np.arange(len(ids))  # by token; tokens that go on
        while len(longer := longer[lengths[longer] >= len(self.levels) - 1]):
            first, end = self.levels[-2:]
            steps = (node[longer] - first) * 256 + text[begins[longer] + len(self.levels) - 2]
            made, which = _distinct(steps, (end - first) * 256)
            parents.append(made // 256 + first)
            last_bytes.append((made % 256).astype(np.uint8))
            node[longer] = end + which
            self.levels.append(end + len(made))
        self.parent = np.concatenate(parents).astype(np.int32)
        self.byte = np.concatenate(last_bytes)
        order = np.argsort(node, kind="stable")
        self.token, self.node = ids[order], node[order]

    @property
    def num_nodes(self) -> int:
        return len(self.byte)


def _distinct(values: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(the different ones of `values` in order, which of them each is), for values below `end`."""
    if end > 64 * len(values) + 4096:
        made, which = np.unique(values, return_inverse=True)
        return made, which.reshape(-1)
    there = np.zeros(end, dtype=bool)
    there[values] = True
    made = np.flatnonzero(there)
    number = np.empty(end, dtype=np.int32)
    number[made] = np.arange(len(made), dtype=np.int32)
    return made, number[values]


def expand(first: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All entries of some groups: (index into `keys` of each, index of the entry). `first` [num_groups + 1] bounds groups."""
    counts = first[keys + 1] - first[keys]
    owner = np.repeat(np.arange(len(keys)), counts)
    offsets = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, first[keys][owner] + offsets


# ---- decoders ------------------------------------------------------------------------------------------------------


def _tokens_of(backend: Any, vocab_size: int, special: set[int], decoder: bytes) -> tuple[bytes | None, ...]:
    """Bytes by id; None for ids below `vocab_size` that no text is spelled with."""
    to_bytes = _decoder(json.loads(decoder or b"null"))
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    tokens: list[bytes | None] = [None] * vocab_size
    for text, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id < vocab_size and token_id not in special:
            tokens[token_id] = (added[token_id].encode() if token_id in added else to_bytes(text)) or None
    return tuple(tokens)


def _may_be_known(tokenizer: Any) -> bool:
    try:
        hash(tokenizer)
        weakref.ref(tokenizer)
    except TypeError:
        return False
    return True


def _decoder(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """How the decoder of a `tokenizers` file turns one token's text into bytes in the middle of a text."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _byte_level
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if unknown := set(kinds) - known:
        raise StructureError(
            f"structured output does not know the bytes of tokens behind a {sorted(unknown)[0]} decoder: use a byte-level BPE "
            "or SentencePiece tokenizer"
        )
    fallback = "ByteFallback" in kinds
    replacements = [(s["pattern"].get("String", ""), s["content"]) for s in steps if s["type"] == "Replace"]
    replacements += [(s.get("replacement", "\u2581"), " ") for s in steps if s["type"] == "Metaspace"]

    def to_bytes(text: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(text) if fallback else None
        if match:
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            text = text.replace(old, new) if old else text
        return text.encode()

    return to_bytes


def _byte_level(text: str) -> bytes:
    try:
        return text.translate(_STAND_INS).encode("latin-1")
    except UnicodeEncodeError:  # characters that stand for no byte are themselves
        table = _byte_level_table()
        return b"".join(table[c] if c in table else c.encode() for c in text)


def _byte_level_table() -> dict[str, bytes]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}


_STAND_INS = dict.fromkeys(range(256), 0xFFFF) | {ord(c): b[0] for c, b in _byte_level_table().items()}
