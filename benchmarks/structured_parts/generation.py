"""Section `generation`: whole generations under a constraint that stops none of them early, beside free ones.

Greedy, the same number of tokens each; a step's time is the difference of a long and a short call.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import models
from benchmarks.structured_parts.context import Context
from benchmarks.structured_parts.record import Rounds, Seconds, row, timed, timing_rows

SECTION = "generation"
BASELINE = "free"
METRIC = "a step, ms"
MODELS = {512: "tiny", 32000: "llama-100m"}
"""By the size of the vocabulary: the models of random weights whose logits have it."""
LENGTHS = (4, 52)
SMOKE_LENGTHS = (2, 6)
NUM_PROMPT = 32
BATCHES = (1, 32)
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "any text": {"regex": r"(?s:.*)\[the end of the text\]"},
    "long strings": {
        "json_schema": {
            "type": "array",
            "items": {"type": "string", "minLength": 200, "maxLength": 256},
            "minItems": 100,
            "maxItems": 100,
        }
    },
}
"""Random weights never come to the end of these. In the first all tokens stay allowed that keep the text valid UTF-8."""


def run(context: Context) -> None:
    """Measure and emit rows."""
    import hf_accel

    for size, bench, tokenizer in models_of(context):
        engine = hf_accel.Engine(bench.model, tokenizer)
        try:
            for batch in [1, 4] if context.smoke else BATCHES:
                context.emit(measure(context, engine, bench, size, batch))
        finally:
            engine.shutdown()


def models_of(context: Context) -> Iterator[tuple[int, models.BenchmarkModel, Any]]:
    """(size, model, tokenizer) that fit each other, of the sizes for which there is a model."""
    for size in context.sizes:
        if size not in MODELS:
            print(f"   no model with a vocabulary of {size}: left out (there are {sorted(MODELS)})")
            continue
        bench, tokenizer = models.load(MODELS[size], torch.float32), context.tokenizer(size)
        bench.model.generation_config.eos_token_id = tokenizer.eos_token_id
        bench.model.generation_config.pad_token_id = tokenizer.pad_token_id
        yield size, bench, tokenizer


def measure(context: Context, engine: Any, bench: models.BenchmarkModel, size: int, batch: int) -> list[dict[str, Any]]:
    """Rows of one batch size."""
    import hf_accel

    prompts = [bench.corpus[i * NUM_PROMPT : (i + 1) * NUM_PROMPT] for i in range(batch)]
    short, long = SMOKE_LENGTHS if context.smoke else LENGTHS
    arms: dict[str, dict[str, Any]] = {BASELINE: {}, **CONSTRAINTS}

    def call(arm: dict[str, Any], length: int) -> Seconds:
        params = hf_accel.SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, jump_forward=False, **arm)
        seconds, outputs = timed(lambda: engine.generate(prompts, params, use_tqdm=False))
        made = [len(o.outputs[0].token_ids) for o in outputs]
        assert made == [length] * batch, f"a generation ended early: {made}"
        return seconds

    found = {name: Rounds() for name in arms}
    shares: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, context.rounds):  # the first compiles, fills the prefix cache, packs weights
        for name, arm in arms.items():
            with constraint_clock() as spent:
                few = call(arm, short)
                before = dataclasses.replace(spent)
                many = call(arm, long)
            if number >= 0:
                steps = long - short
                step = Seconds((many.cpu - few.cpu) / steps, (many.wall - few.wall) / steps)
                found[name].found[number] = step
                own = ((spent.cpu - before.cpu) - before.cpu) / steps
                shares[name].append(own / step.cpu)
    rows = timing_rows(
        {"section": SECTION, "vocabulary": size, "case": bench.name, "batch": batch}, METRIC, found, BASELINE
    )
    for name in CONSTRAINTS:
        share = 100 * statistics.median(shares[name])
        rows.append(
            row(
                SECTION,
                size,
                bench.name,
                name,
                "mask and advance, % of a step",
                batch=batch,
                cpu=share,
                rounds=context.rounds,
            )
        )
    return rows


@contextmanager
def constraint_clock() -> Iterator[Seconds]:
    """Seconds that the sampler spends in what constrains rows, added up while the block lasts."""
    from hf_accel.engine.constraints import ConstrainedRows

    spent = Seconds(0.0, 0.0)
    kept = {name: vars(ConstrainedRows)[name] for name in ("among", "masked", "advance")}

    def clocked(method: Callable[..., Any]) -> Callable[..., Any]:
        def run_clocked(*args: Any, **kwargs: Any) -> Any:
            seconds, result = timed(lambda: method(*args, **kwargs))
            spent.cpu += seconds.cpu
            spent.wall += seconds.wall
            return result

        return run_clocked

    for name, member in kept.items():
        static = isinstance(member, classmethod)
        setattr(
            ConstrainedRows, name, staticmethod(clocked(getattr(ConstrainedRows, name))) if static else clocked(member)
        )
    try:
        yield spent
    finally:
        for name, member in kept.items():
            setattr(ConstrainedRows, name, member)
