"""Plain `generate` and the patched model side by side on the same prompts: every token compared, both timed.

Owns the measurement. Knows the public API only; what is printed is made in `report`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

import hf_accel
from hf_accel.demo import report
from hf_accel.demo.model import load
from hf_accel.demo.prompts import Workload, workloads
from hf_accel.engine import progress

NEAR_TIE_STEPS = 4
"""Two logits at most this many rounding steps of the dtype apart are a near tie."""


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for; see `hf-accel demo --help`."""

    model: str | None = None
    dtype: str = "float32"
    max_new_tokens: int = 48
    num_prompts: int = 16
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """One way of running a workload: the new tokens of each prompt (a final eos included), and the wall time."""

    tokens: list[list[int]]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts per second."""
        return sum(map(len, self.tokens)) / self.seconds


@dataclass(frozen=True)
class Divergence:
    """Where the patched model's tokens of one prompt first differ from the reference, and by how little.

    Attributes:
        prompt: index of the prompt.
        position: index of the new token.
        tokens: the reference's token and ours (None: the sequence had ended).
        logits: of these two, from one full forward of the plain model over the shared history.
        num_steps: how far they are apart, in rounding steps of the model's dtype at that size.
    """

    prompt: int
    position: int
    tokens: tuple[int | None, int | None]
    logits: tuple[float, float]
    num_steps: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding alone explains it."""
        return self.num_steps <= NEAR_TIE_STEPS


@dataclass(frozen=True)
class Comparison:
    """A workload's results: plain one by one (the reference), plain left-padded batch, patched."""

    workload: Workload
    single: Measured
    padded: Measured
    patched: Measured
    hit_rate: float
    num_fallbacks: int
    divergences: list[Divergence]

    @property
    def num_identical(self) -> int:
        """Prompts whose tokens are all the reference's."""
        return len(self.workload.prompts) - len(self.divergences)


def main(options: DemoOptions) -> int:
    """Run the demo and print it; 0 if every token is the reference's (or, below float32, differs at near ties only)."""
    transformers_logging.set_verbosity_error()
    threads = options.threads or (1 if options.model is None else None)  # the shipped model is too small for more
    if threads:
        torch.set_num_threads(threads)
    model, tokenizer = load(options.model, getattr(torch, options.dtype))
    print(report.heading(options.model, model))
    results = compare(model, tokenizer, options)
    for result in results:
        print(report.table(result, exact=options.dtype == "float32"))
        print(report.samples(result, tokenizer))
    fine = all(acceptable(result, options.dtype) for result in results)
    print(report.verdict(results, fine))
    return 0 if fine else 1


def acceptable(result: Comparison, dtype: str) -> bool:
    """float32 must be identical; in a shorter dtype rounding may decide near ties."""
    return not result.divergences if dtype == "float32" else all(d.near_tie for d in result.divergences)


def compare(model: Any, tokenizer: Any, options: DemoOptions) -> list[Comparison]:
    """Run every workload the three ways. The model comes back unpatched.

    Raises:
        ValueError: the model's context is too short for `max_new_tokens`.
        UnsupportedModelError: the model cannot be patched.
    """
    room = getattr(model.config, "max_position_embeddings", None) or 4096
    if options.max_new_tokens >= room - 1:
        raise ValueError(f"--max-new-tokens must be less than {room - 1}: the model's context is {room} tokens")
    jobs = workloads(tokenizer, options.num_prompts, room - options.max_new_tokens, options.seed)
    runner = _Runner(model, tokenizer, options.max_new_tokens)
    results = []
    total = 3 * sum(len(job.prompts) for job in jobs)
    with tqdm(total=total, unit="prompt", leave=False, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}") as bar:
        for job in jobs:  # the three ways run next to each other, so that what else the machine does hits all alike
            bar.set_description("warming up")
            runner.run(job.prompts[:1], max_new_tokens=2)
            bar.set_description("plain generate, one by one")
            single = runner.one_by_one(job.prompts, bar.update)
            bar.set_description("plain generate, left-padded batch")
            padded = runner.batch(job.prompts, bar)
            bar.set_description("hf-accel")
            patched = _run_patched(model, runner, job, bar)
            divergences = runner.divergences(job.prompts, single, patched[0])
            results.append(Comparison(job, single, padded, *patched, divergences))
    return results


def _run_patched(model: Any, runner: _Runner, job: Workload, bar: tqdm) -> tuple[Measured, float, int]:
    """One call on the patched model, from an empty prefix cache: tokens and time, prefix hit rate, fallbacks."""
    hf_accel.patch(model)
    try:
        engine = hf_accel.get_engine(model)
        runner.run(job.prompts[:1], max_new_tokens=2)
        engine.flush_cache()
        before = engine.stats()
        measured = runner.batch(job.prompts, bar)
        after = engine.stats()
    finally:
        hf_accel.unpatch(model)
    num_prompt = after.num_prompt_tokens - before.num_prompt_tokens
    hit_rate = (after.num_cached_tokens - before.num_cached_tokens) / num_prompt if num_prompt else 0.0
    return measured, hit_rate, after.num_fallbacks - before.num_fallbacks


class _Runner:
    """Calls `model.generate` greedily, and takes the padding off what it returns."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        self._model, self._max_new_tokens = model, max_new_tokens
        eos = model.generation_config.eos_token_id
        self._eos = set() if eos is None else set(eos if isinstance(eos, list) else [eos])
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else next(iter(self._eos), 0)
        self._config = GenerationConfig(
            do_sample=False, eos_token_id=eos, pad_token_id=self._pad, bos_token_id=tokenizer.bos_token_id
        )

    def run(self, prompts: Sequence[list[int]], max_new_tokens: int | None = None) -> list[list[int]]:
        """New tokens of each prompt, from one left-padded call."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(p)) + p for p in prompts])  # [num_prompts, longest]
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        device = self._model.device
        self._config.max_new_tokens = max_new_tokens or self._max_new_tokens
        output = self._model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=self._config
        )
        return [self._cut(row) for row in output[:, longest:].tolist()]

    def one_by_one(self, prompts: Sequence[list[int]], on_prompt: Callable[[int], Any]) -> Measured:
        """Each prompt in a call of its own."""
        tokens = []
        began = time.perf_counter()
        for prompt in prompts:
            tokens += self.run([prompt])
            on_prompt(1)
        return Measured(tokens, time.perf_counter() - began)

    def batch(self, prompts: Sequence[list[int]], bar: tqdm) -> Measured:
        """All prompts in one call."""
        end = bar.n + len(prompts)
        began = time.perf_counter()
        with progress.track(bar.update):
            tokens = self.run(prompts)
        seconds = time.perf_counter() - began
        bar.update(end - bar.n)
        return Measured(tokens, seconds)

    def divergences(self, prompts: Sequence[list[int]], reference: Measured, ours: Measured) -> list[Divergence]:
        """The first difference of each prompt that has one, with the logits of both tokens."""
        found = []
        for index, (prompt, expected, got) in enumerate(zip(prompts, reference.tokens, ours.tokens, strict=True)):
            if expected != got:
                found.append(self._divergence(index, prompt, expected, got))
        return found

    def _divergence(self, index: int, prompt: list[int], expected: list[int], got: list[int]) -> Divergence:
        position = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), -1)
        if position < 0:  # one is a prefix of the other: it can only have been cut short
            position = min(len(expected), len(got))
        pair = (_at(expected, position), _at(got, position))
        if None in pair:
            return Divergence(index, position, pair, (float("nan"), float("nan")), float("inf"))
        with torch.no_grad():
            history = torch.tensor([prompt + expected[:position]], device=self._model.device)
            logits = self._model(input_ids=history, use_cache=False).logits[0, -1]
        values = (float(logits[pair[0]]), float(logits[pair[1]]))
        largest = max(abs(values[0]), abs(values[1]), 1e-30)
        step = torch.finfo(logits.dtype).eps * 2.0 ** int(torch.tensor(largest).log2().floor())
        return Divergence(index, position, pair, values, abs(values[0] - values[1]) / step)

    def _cut(self, row: list[int]) -> list[int]:
        for index, token in enumerate(row):
            if token in self._eos:
                return row[: index + 1]
        return row


def _at(tokens: Sequence[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
