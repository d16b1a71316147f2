"""The demo's printed page: heading, tables, texts side by side, verdict. Formats; measures nothing."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_accel.demo.compare import Comparison, Measured

NUM_SAMPLES = 2


def heading(name: str | None, model: Any) -> str:
    """What runs, and on what."""
    size = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return (
        f"{name or 'the shipped demo model'}: {type(model).__name__}, {size / 1e6:.1f}M parameters, {dtype}, "
        f"on {model.device.type} with {torch.get_num_threads()} thread(s)"
    )


def table(result: Comparison, exact: bool) -> str:
    """One workload: throughput, speed-up and agreement of the three ways, and every divergence."""
    prompts = result.workload.prompts
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    lines = [
        "",
        f"{len(prompts)} {result.workload.title} ({shortest} to {longest} tokens)",
        f"  {'':<34}{'tokens/s':>9}{'seconds':>9}{'speed-up':>10}   identical",
        _row("plain generate, one by one", result.single, result, "the reference"),
        _row("plain generate, left-padded batch", result.padded, result, _agreement(result.single, result.padded)),
        _row("hf-accel", result.patched, result, f"{result.num_identical}/{len(prompts)}"),
        f"  prefix hit rate {result.hit_rate:.1%} of prompt tokens",
    ]
    if result.num_fallbacks:
        lines.append(f"  {result.num_fallbacks} call(s) fell back to the original generate")
    lines += [_divergence_line(d, exact) for d in result.divergences]
    return "\n".join(lines)


def _row(label: str, measured: Measured, result: Comparison, agreement: str) -> str:
    speed_up = measured.tokens_per_second / result.single.tokens_per_second
    return f"  {label:<34}{measured.tokens_per_second:>9.0f}{measured.seconds:>9.2f}{speed_up:>9.1f}x   {agreement}"


def _agreement(reference: Measured, other: Measured) -> str:
    same = sum(a == b for a, b in zip(reference.tokens, other.tokens, strict=True))
    return f"{same}/{len(reference.tokens)}"


def _divergence_line(divergence: Any, exact: bool) -> str:
    d = divergence
    where = f"  prompt {d.prompt} differs from new token {d.position} on: "
    if None in d.tokens:
        return where + "one of the two ended there"
    kind = "a near tie" if d.near_tie else "not a near tie"
    note = " (float32 must be identical)" if exact else ""
    return (
        f"{where}token {d.tokens[0]} has logit {d.logits[0]:.5g}, token {d.tokens[1]} has {d.logits[1]:.5g}, "
        f"{d.num_steps:.1f} rounding steps apart: {kind}{note}"
    )


def samples(result: Comparison, tokenizer: Any) -> str:
    """A few continuations, plain on the left and patched on the right."""
    width = max(30, (min(shutil.get_terminal_size((110, 24)).columns, 140) - 7) // 2)
    lines = []
    for index in range(min(NUM_SAMPLES, len(result.workload.prompts))):
        prompt = tokenizer.decode(result.workload.prompts[index], skip_special_tokens=True)
        left = _wrap(tokenizer.decode(result.single.tokens[index], skip_special_tokens=True), width)
        right = _wrap(tokenizer.decode(result.patched.tokens[index], skip_special_tokens=True), width)
        lines += ["", f"  ...{' '.join(prompt[-90:].split())}"]
        lines.append(f"  {'plain generate':<{width}} | hf-accel")
        for row in range(max(len(left), len(right))):
            lines.append(
                f"  {left[row] if row < len(left) else '':<{width}} | {right[row] if row < len(right) else ''}"
            )
    return "\n".join(line.rstrip() for line in lines)


def _wrap(text: str, width: int, most: int = 6) -> list[str]:
    rows = [row for line in text.strip().splitlines() for row in (textwrap.wrap(line, width) or [""])]
    return rows[:most] or ["(nothing: the text ends here)"]


def verdict(results: Sequence[Comparison], fine: bool) -> str:
    """The last line: do the tokens agree, and how much faster was it."""
    same = sum(r.num_identical for r in results)
    total = sum(len(r.workload.prompts) for r in results)
    num_tokens = sum(len(t) for r in results for t in r.patched.tokens)
    single, padded = (sum(getattr(r, way).seconds for r in results) for way in ("single", "padded"))
    ours = sum(r.patched.seconds for r in results)
    answer = f"identical: {same}/{total} prompts, {num_tokens} tokens compared"
    if same < total:
        answer += "; every difference is a near tie" if fine else "; THE ANSWERS DIFFER"
    return f"\n{answer}; {single / ours:.1f}x plain generate one by one, {padded / ours:.1f}x the padded batch"
