"""What the sections are run with: sizes, peers, rounds, where tokenizers are, and where rows go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.structured_parts import vocabularies
from benchmarks.structured_parts.sides import SIDES, Side

SMOKE_SIZE = 512
SMOKE_CASES = ("date", "email", "person", "enum50")
SMOKE_BYTES = 150_000
SMOKE_SOURCES = Path(__file__).resolve().parent.parent


@dataclass
class Context:
    """Handed to every section.

    Attributes:
        sizes: of the vocabularies.
        cases: names that are measured; empty: all of a section.
        batches: rows of a step.
        peers: packages to compare with.
        rounds: how often every side has its turn.
        seconds: a side that took longer in all on one case has no more rounds there.
        folder: for tokenizers and compiled constraints.
        smoke: tiny, to see that everything runs.
        emit: takes finished rows, after each case.
    """

    sizes: list[int]
    cases: list[str]
    batches: list[int]
    peers: list[str]
    rounds: int
    seconds: float
    folder: Path
    smoke: bool
    emit: Callable[[list[dict[str, Any]]], None]
    _tokenizers: dict[int, Any] = field(default_factory=dict)

    def tokenizer(self, size: int) -> Any:
        """The tokenizer of so many ids; trained at the first call on a machine."""
        if size not in self._tokenizers:
            began = time.perf_counter()
            if self.smoke:
                made = vocabularies.load(size, self.folder, size, SMOKE_BYTES, [SMOKE_SOURCES])
            else:
                made = vocabularies.load(size, self.folder)
            self._tokenizers[size] = made
            print(f"   tokenizer of {size} ids: {time.perf_counter() - began:.1f} s", flush=True)
        return self._tokenizers[size]

    def train(self) -> None:
        """Make all tokenizers."""
        for size in self.sizes:
            self.tokenizer(size)

    def wants(self, case: str) -> bool:
        """Whether a case is to be measured."""
        return not self.cases or case in self.cases

    def sides(self) -> list[type[Side]]:
        """Ours, and those of the peers that are there."""
        return [side for side in SIDES.values() if not side.package or side.package in self.peers]

    def has(self, *packages: str) -> bool:
        """Whether all of these peers are to be compared with."""
        return all(package in self.peers for package in packages)
