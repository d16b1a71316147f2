"""What bytes each token id stands for, read from a tokenizer's own decoder, and the trie of these byte strings.

Owns the reading of byte-level BPE, SentencePiece (with byte fallback) and plain vocabularies. Special tokens and ids without a
token stand for nothing: they are never allowed by a constraint, except an end of sequence where it may end.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hf_accel.structured.syntax import StructureError

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
        """The vocabulary of a HF tokenizer.

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
        description = json.loads(backend.to_str())
        special = {t["id"] for t in description.get("added_tokens", ()) if t.get("special")}
        special |= {*getattr(tokenizer, "all_special_ids", ()), *eos_token_ids}
        added = {t["id"]: t["content"] for t in description.get("added_tokens", ())}
        to_bytes = _decoder(description.get("decoder"))
        tokens: list[bytes | None] = [None] * vocab_size
        for text, token_id in backend.get_vocab(with_added_tokens=True).items():
            if token_id < vocab_size and token_id not in special:
                tokens[token_id] = added[token_id].encode() if token_id in added else to_bytes(text)
        return cls(tuple(t or None for t in tokens), tuple(sorted(set(eos_token_ids))))

    @property
    def size(self) -> int:
        """Width of the logits."""
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        """Of everything that a compiled constraint depends on."""
        state = hashlib.sha256(repr((self.size, self.eos_token_ids)).encode())
        for token in self.tokens:
            state.update(b"\xff" if token is None else len(token).to_bytes(4, "little") + token)
        return state.hexdigest()

    @cached_property
    def trie(self) -> TokenTrie:
        """The tokens' byte strings as a trie."""
        return TokenTrie(self.tokens)


class TokenTrie:
    """Byte strings that begin alike share their way. Node 0 is the root; children come after their parents.

    Attributes:
        first_child: [num_nodes + 1] int64, where each node's children begin in `child` (and where the last one's end).
        child: [num_nodes - 1] int64, nodes by parent.
        byte: [num_nodes] uint8, the last byte of each node's string.
        first_token: [num_nodes + 1] int64, where the ids of the tokens that end at a node begin in `token`.
        token: ids by node.
    """

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        order = sorted((token, i) for i, token in enumerate(tokens) if token)
        parents, ends, last_bytes = [-1], [], [0]
        path, before = [0], b""  # nodes of the token before, by length
        for token, token_id in order:
            common = _common_prefix(before, token)
            del path[common + 1 :]
            for byte in token[common:]:
                parents.append(path[-1])
                last_bytes.append(byte)
                path.append(len(parents) - 1)
            ends.append((path[-1], token_id))
            before = token
        self.byte = np.array(last_bytes, dtype=np.uint8)
        self.first_child, self.child = _grouped(
            np.array(parents[1:], dtype=np.int64), np.arange(1, len(parents)), len(parents)
        )
        nodes, ids = np.array(ends, dtype=np.int64).reshape(-1, 2).T
        self.first_token, self.token = _grouped(nodes, ids, len(parents))

    @property
    def num_nodes(self) -> int:
        return len(self.byte)


def expand(first: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All entries of some groups: (index into `keys` of each, index of the entry). `first` [num_groups + 1] bounds groups."""
    counts = first[keys + 1] - first[keys]
    owner = np.repeat(np.arange(len(keys)), counts)
    offsets = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, first[keys][owner] + offsets


def _grouped(keys: np.ndarray, values: np.ndarray, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    first = np.zeros(num_keys + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=num_keys), out=first[1:])
    return first, values[order]


def _common_prefix(a: bytes, b: bytes) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


# ---- decoders ------------------------------------------------------------------------------------------------------


def _decoder(decoder: dict[str, Any] | None) -> Any:
    """How the decoder of a `tokenizers` file turns one token's text into bytes in the middle of a text."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        return lambda text: b"".join(table[c] if c in table else c.encode() for c in text)
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


def _byte_level_table() -> dict[str, bytes]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}
