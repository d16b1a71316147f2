"""Section `json`: characters as JSON of a fixed layout with free fields of up to 16 characters, 16 names, greedy, 256 tokens at
most; forward passes a token, and seconds. By hf-accel, and by HF's `generate` with a logits processor or without.

Most of the text is forced by the layout: this is where jump-forward has something to jump over.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import models
from benchmarks.structured_parts.cases import HOUSES, NAMES, Case
from benchmarks.structured_parts.compiling import first_line
from benchmarks.structured_parts.context import Context
from benchmarks.structured_parts.generation import models_of
from benchmarks.structured_parts.processors import processors
from benchmarks.structured_parts.record import Rounds, row, timed, timing_rows

SECTION = "json"
CASE = "character layout"
METRIC = "ms a token"
MAX_TOKENS = 256
SMOKE_TOKENS = 24
NUM_STREAMS = 4
FIELD = "[A-Za-z0-9 ]{1,16}"
LAYOUT = rf"""\{{
    "name": "{FIELD}",
    "house": "({"|".join(HOUSES)})",
    "status": "(alive|dead|unknown)",
    "occupation": "{FIELD}",
    "tool": \{{
        "wood": "{FIELD}",
        "core": "{FIELD}",
        "length": [0-9]{{1,2}}\.[0-9]
    \}},
    "friend": "{FIELD}",
    "fear": "{FIELD}"
\}}"""
CHARACTER = Case(CASE, "regex", LAYOUT, lambda rng: "")
FULL_NAMES = (*NAMES, *(f"{n.split()[0]} {m.split()[1]}" for n, m in zip(NAMES, NAMES[3:] + NAMES[:3], strict=True)))


@dataclass
class Result:
    """What one run gave.

    Attributes:
        outputs: new tokens of each prompt, without what follows an end.
        num_passes: calls of the model, the prompt's included.
    """

    outputs: list[list[int]]
    num_passes: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.outputs))


def run(context: Context) -> None:
    """Measure and emit rows."""
    import hf_accel

    for size, bench, tokenizer in models_of(context):
        fresh = FreshEngine(functools.partial(hf_accel.Engine, bench.model, tokenizer))
        try:
            for batch in [2] if context.smoke else [1, len(FULL_NAMES)]:
                context.emit(measure(context, fresh, bench, tokenizer, size, batch))
        finally:
            fresh.engine.shutdown()


class FreshEngine:
    """One that has learnt nothing yet of how the model spells the layout: repeated prompts would be known by heart."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.engine = make()

    def renew(self) -> None:
        """An engine that has run, but under no constraint."""
        import hf_accel

        self.engine.shutdown()
        self.engine = self._make()
        self.engine.generate([[5, 6, 7]], hf_accel.SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)


def measure(
    context: Context, fresh: FreshEngine, bench: models.BenchmarkModel, tokenizer: Any, size: int, batch: int
) -> list[dict[str, Any]]:
    """Rows of one batch size; with 1, some prompts one after the other."""
    names = FULL_NAMES[:batch] if batch > 1 else FULL_NAMES[:NUM_STREAMS]
    texts = [f"{name} is a character of a novel. A description of {name} as JSON:\n" for name in names]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    calls = [prompts] if batch > 1 else [[prompt] for prompt in prompts]
    ours = our_arms(context, fresh, calls)
    arms = ours | hf_arms(context, bench, tokenizer, calls)
    found = {name: Rounds() for name in arms}
    last: dict[str, Result] = {}
    notes: dict[str, str] = {}
    for number in range(-1, context.rounds):
        for name, arm in arms.items():
            if name in notes or (number > 0 and sum(s.wall for s in found[name].found.values()) > 4 * context.seconds):
                continue
            if number < 0 and name not in ours:
                continue
            if name in ours:
                fresh.renew()
            try:
                seconds, last[name] = timed(arm)
            except (ValueError, RuntimeError, AssertionError) as error:
                notes[name] = f"failed: {first_line(error)}"
                continue
            if number >= 0:
                seconds.cpu /= last[name].num_tokens
                seconds.wall /= last[name].num_tokens
                found[name].found[number] = seconds
    where = {"section": SECTION, "vocabulary": size, "case": CASE, "batch": batch}
    rows = timing_rows(where, METRIC, found, "hf_accel")
    for name, result in last.items():
        passes = result.num_passes * batch / result.num_tokens
        rows.append(row(**where, side=name, metric="forward passes x rows, a token", cpu=passes))
        rows.append(row(**where, side=name, metric="tokens", cpu=result.num_tokens))
        if "free" not in name:
            equal = sum(a == b for a, b in zip(result.outputs, last["hf_accel"].outputs, strict=True)) / len(prompts)
            rows.append(row(**where, side=name, metric="share of outputs equal to hf_accel's", cpu=equal))
    return rows + [row(**where, side=name, metric=METRIC, note=note) for name, note in notes.items()]


def our_arms(context: Context, fresh: FreshEngine, calls: list[list[list[int]]]) -> dict[str, Callable[[], Result]]:
    """The engine under the layout, with jump-forward on and off where there is such a switch; and without a constraint."""
    import hf_accel

    common = {"temperature": 0.0, "max_tokens": SMOKE_TOKENS if context.smoke else MAX_TOKENS}
    options: dict[str, dict[str, Any]] = {"hf_accel free": {"ignore_eos": True}, "hf_accel": {"regex": LAYOUT}}
    if "jump_forward" in inspect.signature(hf_accel.SamplingParams).parameters:
        options["hf_accel without jumps"] = {"regex": LAYOUT, "jump_forward": False}
    else:
        print("   SamplingParams has no jump_forward: its arms are left out")

    def arm(params: Any) -> Callable[[], Result]:
        def generate() -> Result:
            count, engine = 0, fresh.engine
            runner = engine.core.executor.runner
            forward = runner.forward

            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                return forward(*args, **kwargs)

            runner.forward = counted
            try:
                outputs = [o for prompts in calls for o in engine.generate(prompts, params, use_tqdm=False)]
            finally:
                del runner.forward
            return Result([list(o.outputs[0].token_ids) for o in outputs], count)

        return generate

    return {name: arm(hf_accel.SamplingParams(**common, **more)) for name, more in options.items()}


def hf_arms(
    context: Context, bench: models.BenchmarkModel, tokenizer: Any, calls: list[list[list[int]]]
) -> dict[str, Callable[[], Result]]:
    """`model.generate` of the unpatched model, left-padded: free, with our processor, and with the peers'."""
    sides = {make.name: make(tokenizer) for make in context.sides()}
    compiled: dict[str, Any] = {}
    for name, side in sides.items():
        try:
            compiled[name] = side.compile(CHARACTER)
        except (ValueError, RuntimeError) as error:
            print(f"   {name} refuses the layout: {first_line(error)}")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    length = SMOKE_TOKENS if context.smoke else MAX_TOKENS

    def arm(make: Callable[[], Any] | None) -> Callable[[], Result]:
        def generate() -> Result:
            count = 0

            def counted(*_: Any) -> None:
                nonlocal count
                count += 1

            hook = bench.model.register_forward_pre_hook(counted)
            rows = []
            try:
                for prompts in calls:
                    more: dict[str, Any] = {"eos_token_id": None}
                    if make is not None:
                        more = {"eos_token_id": eos, "logits_processor": [make()]}
                    longest = max(map(len, prompts))
                    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])  # [batch, longest]
                    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
                    output = bench.model.generate(
                        ids, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=pad, **more
                    )
                    rows += output[:, longest:].tolist()
            finally:
                hook.remove()
            return Result([r[: r.index(eos) + 1] if make is not None and eos in r else r for r in rows], count)

        return generate

    made = {"HF generate free": arm(None)}
    for name, make in processors(context, sides, compiled, CHARACTER).items():
        made[f"HF generate, {name}"] = arm(make)
    return made
