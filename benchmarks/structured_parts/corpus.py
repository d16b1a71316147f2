"""Text to train tokenizers on: Python sources and documents that are on the machine, and JSON of a seeded generator."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_BYTES_PER_FILE = 200_000
SHARES = {"source": 0.65, "documents": 0.15, "json": 0.2}
"""Of the bytes asked for; a machine with less of one kind gives less."""


def texts(num_bytes: int, folders: Sequence[Path] = ()) -> Iterator[str]:
    """About so many bytes of text, in an order that depends on nothing but what is there.

    Args:
        num_bytes: where there is enough.
        folders: where to look for files; default: the standard library and the installed packages.
    """
    found = _files(folders or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")])
    words: list[str] = []
    for kind in ("source", "documents"):
        left = int(num_bytes * SHARES[kind])
        for path in found[kind]:
            if left <= 0:
                break
            text = _read(path)
            left -= len(text)
            if len(words) < 40_000:
                words += re.findall(r"[A-Za-z]{2,12}", text[:4000])
            yield text
    yield from json_texts(words or ["word"], int(num_bytes * SHARES["json"]))


def json_texts(words: list[str], num_bytes: int) -> Iterator[str]:
    """JSON documents of random records, in the ways in which programs print them."""
    rng = random.Random(7)
    while num_bytes > 0:
        document = [_record(rng, words, 2) for _ in range(rng.randint(1, 12))]
        style: dict[str, Any] = rng.choice([{}, {"indent": 2}, {"indent": 4}, {"separators": (",", ":")}])
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5, **style)
        num_bytes -= len(text)
        yield text


def _record(rng: random.Random, words: list[str], depth: int) -> dict[str, Any]:
    return {_key(rng, words): _value(rng, words, depth) for _ in range(rng.randint(2, 8))}


def _key(rng: random.Random, words: list[str]) -> str:
    common = ("id", "name", "type", "value", "title", "email", "date", "tags", "items", "description", "status", "url")
    return rng.choice(common) if rng.random() < 0.6 else "_".join(rng.choices(words, k=rng.randint(1, 2))).lower()


def _value(rng: random.Random, words: list[str], depth: int) -> Any:
    kind = rng.randrange(10 if depth else 7)
    if kind == 0:
        return rng.randint(-10, 100_000)
    if kind == 1:
        return round(rng.uniform(-100, 1000), rng.randint(1, 4))
    if kind == 2:
        return rng.choice([True, False, None])
    if kind == 3:
        return f"{rng.randint(1990, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    if kind == 4:
        return f"{rng.choice(words).lower()}@{rng.choice(words).lower()}.{rng.choice(['com', 'org', 'net'])}"
    if kind < 7:
        return " ".join(rng.choices(words, k=rng.randint(1, 14)))
    if kind == 7:
        return [_value(rng, words, 0) for _ in range(rng.randint(0, 5))]
    return _record(rng, words, depth - 1)


def _files(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by kind, in the order of a hash of their names: a part of them is a sample of all."""
    found: dict[str, dict[str, Path]] = {"source": {}, "documents": {}}
    for folder in folders:
        for path in folder.rglob("*"):
            kind = _kind(path)
            if kind:
                name = str(path.relative_to(folder))
                found[kind].setdefault(hashlib.sha256(name.encode()).hexdigest(), path)
    return {kind: [path for _, path in sorted(paths.items())] for kind, paths in found.items()}


def _kind(path: Path) -> str:
    if path.suffix == ".py":
        return "source"
    return "documents" if path.name == "METADATA" or path.suffix in (".rst", ".md", ".txt") else ""


def _read(path: Path) -> str:
    try:
        return path.read_bytes()[:MOST_BYTES_PER_FILE].decode("utf-8", errors="ignore")
    except OSError:
        return ""
