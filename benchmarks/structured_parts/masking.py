"""Section `mask`: what a step costs beside the model, by batch: making masks, putting them on the logits, advancing.

Rows follow texts that match, token by token, all from the first one on, as `generate` has it. Logits are fp32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.structured_parts.cases import CASES, MASK_CASES, Case
from benchmarks.structured_parts.compiling import first_line
from benchmarks.structured_parts.context import Context
from benchmarks.structured_parts.processors import processors
from benchmarks.structured_parts.record import Rounds, Seconds, row, timed, timing_rows
from benchmarks.structured_parts.sides import HfAccel, Side

SECTION = "mask"
BASELINE = "masked_fill"
METRIC = "a step, us"
NUM_TEXTS = 8
NUM_PROMPT = 8
MOST_STEPS = 48
MOST_LOGITS = 1 << 29
"""Steps x rows x vocabulary of one round; larger batches take fewer steps."""

Arm = Callable[[], Callable[[int, Tensor], Any]]
"""Begins a walk; gives what does step `k` on logits that may be changed."""


def run(context: Context) -> None:
    """Measure and emit rows."""
    for size in context.sizes:
        tokenizer = context.tokenizer(size)
        sides = {make.name: make(tokenizer) for make in context.sides()}
        for name in MASK_CASES:
            if not context.wants(name):
                continue
            compiled, refused = compile_all(sides, CASES[name], size)
            context.emit(refused)
            for batch in batches(context, size) if "hf_accel" in compiled else []:
                context.emit(mask_case(context, CASES[name], size, batch, sides, compiled))


def batches(context: Context, size: int) -> list[int]:
    """At the largest vocabulary one more, which the reference has."""
    return sorted({*context.batches, 8}) if size >= 128000 and len(context.batches) > 1 else context.batches


def compile_all(sides: dict[str, Side], case: Case, size: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(compiled by side, rows of the sides that refuse)."""
    compiled: dict[str, Any] = {}
    refused = []
    for name, side in sides.items():
        try:
            compiled[name] = side.compile(case)
        except (ValueError, RuntimeError) as error:
            refused.append(row(SECTION, size, case.name, name, METRIC, note=f"refused: {first_line(error)}"))
    return compiled, refused


def mask_case(
    context: Context, case: Case, size: int, batch: int, sides: dict[str, Side], compiled: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of one constraint at one batch size."""
    tokenizer = context.tokenizer(size)
    ids = walk_ids(tokenizer, case, batch, size)  # [batch, NUM_PROMPT + num_steps]
    logits = torch.randn(batch, size, generator=torch.Generator().manual_seed(0))
    ours = sides["hf_accel"]
    assert isinstance(ours, HfAccel)
    arms: dict[str, Arm] = {**bare_arms(ours, compiled["hf_accel"], ids), **our_arms(ours, compiled["hf_accel"], ids)}
    for name, make in processors(context, sides, compiled, case).items():
        arms[name] = processor_arm(make, ids)
    found = {name: Rounds() for name in arms}
    scratch = torch.empty_like(logits)
    notes: dict[str, str] = {}
    for number in range(-1, context.rounds):  # the first warms up, and lets torch compile what peers give it
        for name, begin in arms.items():
            spent = sum(s.cpu for s in found[name].found.values()) * (ids.shape[1] - NUM_PROMPT)
            if name in notes or (number > 0 and spent > context.seconds):
                continue
            try:
                seconds = walk(begin(), ids.shape[1] - NUM_PROMPT, logits, scratch)
            except (ValueError, RuntimeError, AssertionError) as error:
                notes[name] = f"failed: {first_line(error)}"
                continue
            if number >= 0:
                found[name].found[number] = seconds
    where = {"section": SECTION, "vocabulary": size, "case": case.name, "batch": batch}
    failed = [row(**where, side=name, metric=METRIC, note=note) for name, note in notes.items()]
    return timing_rows(where, METRIC, found, BASELINE, scale=1e6) + failed


def walk(step: Callable[[int, Tensor], Any], num_steps: int, logits: Tensor, scratch: Tensor) -> Seconds:
    """Median seconds of a step."""
    taken = []
    for k in range(num_steps):
        scratch.copy_(logits)
        taken.append(timed(lambda k=k: step(k, scratch))[0])
    return Seconds(statistics.median(s.cpu for s in taken), statistics.median(s.wall for s in taken))


def walk_ids(tokenizer: Any, case: Case, batch: int, size: int) -> Tensor:
    """[batch, NUM_PROMPT + num_steps] int64: a prompt, and the first tokens of texts that match."""
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in case.instances(min(NUM_TEXTS, batch))]
    num_steps = min(MOST_STEPS, max(2, MOST_LOGITS // (batch * size)), min(map(len, texts)))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, size, (batch, NUM_PROMPT), generator=generator)
    rows = torch.tensor([texts[i % len(texts)][:num_steps] for i in range(batch)])
    return torch.cat([prompts, rows], dim=1)


def bare_arms(ours: HfAccel, fsm: Any, ids: Tensor) -> dict[str, Arm]:
    """`masked_fill` alone, with a mask that is there; into a copy, and in place."""
    table = ours.table()
    states = torch.full((ids.shape[0],), table.start(fsm))
    forbidden = table.masked(torch.zeros(ids.shape[0], ours.vocabulary.size), states) == -torch.inf
    return {
        "masked_fill": lambda: lambda k, scores: scores.masked_fill(forbidden, -torch.inf),
        "masked_fill_": lambda: lambda k, scores: scores.masked_fill_(forbidden, -torch.inf),
    }


def our_arms(ours: HfAccel, fsm: Any, ids: Tensor) -> dict[str, Arm]:
    """The engine's table: mask and advance, into a copy (as the sampler does) and in place; and the advance alone."""
    table = ours.table()
    start = torch.full((ids.shape[0],), table.start(fsm))
    tokens = [column.contiguous() for column in ids[:, NUM_PROMPT:].unbind(1)]

    def begin(mask: Callable[[Tensor, Tensor], Any] | None) -> Callable[[int, Tensor], Any]:
        states = start

        def step(k: int, scores: Tensor) -> Any:
            nonlocal states
            masked = mask(scores, states) if mask is not None else scores
            states = table.advance(states, tokens[k])
            return masked

        return step

    return {
        "hf_accel": lambda: begin(table.masked),
        "hf_accel in place": lambda: begin(table.apply),
        "hf_accel advance only": lambda: begin(None),
    }


def processor_arm(make: Callable[[], Any], ids: Tensor) -> Arm:
    """A logits processor that sees the rows grow."""
    lengths = range(NUM_PROMPT, ids.shape[1])
    seen: Sequence[Tensor] = [ids[:, :length].contiguous() for length in lengths]

    def begin() -> Callable[[int, Tensor], Any]:
        processor = make()
        return lambda k, scores: processor(seen[k], scores)

    return begin
