"""The workloads of the side-by-side runs: seeded lists of token ids and lengths, and what prefix reuse could save at best.

A workload is stages of generations. A generation appends tokens to an earlier generation's prompt and output (its
parent) and completes them; stages run one after the other, the generations of a stage are independent. Knows no model,
no engine and no torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SEED = 42


@dataclass(frozen=True)
class Generation:
    """One completion to make.

    Attributes:
        tokens: ids appended to what the parent ended with; the whole prompt if there is no parent.
        max_new_tokens: exactly so many are generated.
        parent: index of an earlier generation, counted over all stages in order.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    parent: int | None = None


@dataclass(frozen=True)
class Workload:
    """Generations in stages.

    Attributes:
        name: as in `NAMES`.
        stages: see the module's docstring.
        n: completions of each prompt; more than 1 only with sampling and a single stage.
        temperature, top_k: 0 is greedy.
    """

    name: str
    stages: tuple[tuple[Generation, ...], ...]
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0

    @property
    def generations(self) -> list[Generation]:
        """All of them, in order."""
        return [g for stage in self.stages for g in stage]

    @property
    def sampled(self) -> bool:
        """Whether outputs depend on random numbers."""
        return self.temperature > 0

    @property
    def one_call(self) -> bool:
        """Whether a single `generate` call says it all: one stage, one output length."""
        return len(self.stages) == 1 and len({g.max_new_tokens for g in self.stages[0]}) == 1

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that a run produces."""
        return self.n * sum(g.max_new_tokens for g in self.generations)

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, new tokens) of each generation."""
        found: list[tuple[int, int]] = []
        for g in self.generations:
            before = 0 if g.parent is None else sum(found[g.parent])
            found.append((before + len(g.tokens), g.max_new_tokens))
        return found

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests, each of the n counted."""
        return self.n * sum(prompt for prompt, _ in self.lengths())

    def prompt(self, index: int, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[int]:
        """Prompt of a generation, from the prompts and outputs of those before it."""
        g = self.generations[index]
        before = [] if g.parent is None else [*prompts[g.parent], *outputs[g.parent]]
        return [*before, *g.tokens]

    def ideal_hit_rate(self) -> float:
        """Share of the prompt tokens that an engine need not compute, with an endless cache.

        Requests are taken in order: a request reuses its longest common prefix with everything computed before it, also
        in its own stage. A prompt's last token is always computed (its logits are wanted), a last output token never.
        """
        return sum(common for common, _ in self._reuse()) / self.num_prompt_tokens

    def num_pages(self, page_size: int) -> int:
        """Pages that hold all its sequences at once, if whole pages of common prefixes are shared."""
        return sum(-(-total // page_size) - common // page_size for common, total in self._reuse())

    def _reuse(self) -> list[tuple[int, int]]:
        """(prompt tokens that need not be computed, prompt and new tokens) of each request, in order."""
        tree: dict[int, dict] = {}
        prompts: list[list[int]] = []
        outputs: list[list[int]] = []
        found: list[tuple[int, int]] = []
        fresh = -1
        for index, g in enumerate(self.generations):
            prompt = self.prompt(index, prompts, outputs)
            for _ in range(self.n):
                common = min(_common_prefix(tree, prompt), len(prompt) - 1)
                found.append((common, len(prompt) + g.max_new_tokens))
                output = [fresh - i for i in range(g.max_new_tokens)]  # like no other tokens
                fresh -= g.max_new_tokens
                _insert(tree, prompt + output[:-1])
            prompts.append(prompt)
            outputs.append(output)
        return found


class _Draw:
    """Random slices of a corpus, and lengths."""

    def __init__(self, corpus: Sequence[int], seed: int) -> None:
        self._corpus, self._random = corpus, random.Random(seed)

    def tokens(self, length: int) -> tuple[int, ...]:
        start = self._random.randrange(len(self._corpus) - length)
        return tuple(self._corpus[start : start + length])

    def length(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


def single_stream(draw: _Draw, room: int) -> Workload:
    """One prompt of 128 tokens, 64 new ones."""
    return Workload("single_stream", ((Generation(draw.tokens(128), 64),),))


def equal_rows(draw: _Draw, room: int) -> Workload:
    """16 prompts of 64 tokens, 48 new ones each."""
    return Workload("equal_rows", (tuple(Generation(draw.tokens(64), 48) for _ in range(16)),))


def random_lengths(draw: _Draw, room: int) -> Workload:
    """nano-vllm's bench scaled down: 32 requests, prompts and outputs of 16 to 128 tokens."""
    stage = tuple(Generation(draw.tokens(draw.length(16, 128)), draw.length(16, 128)) for _ in range(32))
    return Workload("random_lengths", (stage,))


def shared_prefix(draw: _Draw, room: int) -> Workload:
    """16 prompts that share 1024 tokens (fewer in a short model), 32 own ones, 32 new ones each."""
    prefix = draw.tokens(min(1024, room - 64))
    return Workload("shared_prefix", (tuple(Generation(prefix + draw.tokens(32), 32) for _ in range(16)),))


def multi_turn(draw: _Draw, room: int) -> Workload:
    """4 conversations of 4 turns in lock step: 48 tokens in, 32 out, on the whole history."""
    stages = [
        tuple(Generation(draw.tokens(48), 32, parent=4 * (turn - 1) + i if turn else None) for i in range(4))
        for turn in range(4)
    ]
    return Workload("multi_turn", tuple(stages))


def self_consistency(draw: _Draw, room: int) -> Workload:
    """8 samples of one prompt of 512 tokens, 48 new ones each, temperature 0.7 and top-k 40."""
    stage = (Generation(draw.tokens(512), 48),)
    return Workload("self_consistency", (stage,), n=8, temperature=0.7, top_k=40)


def tree_of_thought(draw: _Draw, room: int) -> Workload:
    """2 branches on 4 levels, 30 generations of 24 tokens on a question of 256; each branch adds 8 tokens of its own."""
    question = draw.tokens(256)
    branches = [[draw.tokens(8) for _ in range(2)] for _ in range(4)]
    stages: list[tuple[Generation, ...]] = []
    parents: list[int | None] = [None]
    num_before = 0
    for level in range(4):
        stage = tuple(
            Generation((question if parent is None else ()) + branch, 24, parent)
            for parent in parents
            for branch in branches[level]
        )
        stages.append(stage)
        parents = list(range(num_before, num_before + len(stage)))
        num_before += len(stage)
    return Workload("tree_of_thought", tuple(stages))


_MAKERS: dict[str, Callable[[_Draw, int], Workload]] = {
    f.__name__: f
    for f in (
        single_stream,
        equal_rows,
        random_lengths,
        shared_prefix,
        multi_turn,
        self_consistency,
        tree_of_thought,
    )
}
NAMES = tuple(_MAKERS)


def make(name: str, corpus: Sequence[int], max_positions: int) -> Workload:
    """A workload by name, over a model's corpus; the same arguments give the same tokens.

    Raises:
        ValueError: the name is unknown, or the model is too short for it.
    """
    if name not in _MAKERS:
        raise ValueError(f"unknown workload {name!r}; known: {', '.join(NAMES)}")
    workload = _MAKERS[name](_Draw(corpus, SEED), max_positions)
    longest = max(sum(pair) for pair in workload.lengths())
    if longest > max_positions:
        raise ValueError(f"{name} needs {longest} positions, the model has {max_positions}")
    return workload


def shrunk(workload: Workload, tokens: int = 6, generations: int = 4) -> Workload:
    """A few short generations of the same form, for smoke runs: a stage keeps its first ones whose parents are kept."""
    kept: dict[int, int] = {}
    stages: list[tuple[Generation, ...]] = []
    index = 0
    for stage in workload.stages:
        small: list[Generation] = []
        for g in stage:
            if len(small) < generations and (g.parent is None or g.parent in kept):
                kept[index] = len(kept)
                parent = None if g.parent is None else kept[g.parent]
                small.append(Generation(g.tokens[-48:], min(g.max_new_tokens, tokens), parent))
            index += 1
        stages.append(tuple(small))
    return Workload(workload.name, tuple(stages), min(workload.n, 2), workload.temperature, workload.top_k)


def _common_prefix(tree: dict[int, dict], tokens: Sequence[int]) -> int:
    for depth, token in enumerate(tokens):
        if token not in tree:
            return depth
        tree = tree[token]
    return len(tokens)


def _insert(tree: dict[int, dict], tokens: Sequence[int]) -> None:
    for token in tokens:
        tree = tree.setdefault(token, {})
