"""Section `compile`: cold compile, first mask and bytes of each case at each vocabulary."""

from __future__ import annotations

import functools
import time
from typing import Any

from benchmarks.structured_parts.cases import CASES, Case
from benchmarks.structured_parts.context import Context
from benchmarks.structured_parts.record import Rounds, Seconds, row, timed, timing_rows
from benchmarks.structured_parts.sides import Side

SECTION = "compile"
BASELINE = "hf_accel"


def run(context: Context) -> None:
    """Measure and emit rows."""
    for size in context.sizes:
        tokenizer = context.tokenizer(size)
        sides: dict[str, Side] = {}
        rows = []
        for make in context.sides():
            seconds, sides[make.name] = timed(functools.partial(make, tokenizer), time.process_time)
            rows.append(
                row(
                    SECTION, size, "setup", make.name, "set-up for the tokenizer, ms",
                    cpu=1e3 * seconds.cpu, wall=1e3 * seconds.wall, rounds=1,
                )
            )  # fmt: skip
        context.emit(rows)
        for case in CASES.values():
            if context.wants(case.name):
                context.emit(compile_case(context, case, size, sides))


def compile_case(context: Context, case: Case, size: int, sides: dict[str, Side]) -> list[dict[str, Any]]:
    """Rows of one constraint: the sides in turn, round by round."""
    compiles = {name: Rounds() for name in sides}
    firsts = {name: Rounds() for name in sides}
    last: dict[str, Any] = {}
    rows = []
    for number in range(context.rounds):
        for name, side in sides.items():
            spent = sum(s.cpu for s in firsts[name].found.values())
            if spent > context.seconds or (number and name not in last):
                continue
            last.pop(name, None)
            side.forget()
            try:
                compiled, made = timed(functools.partial(side.compile, case), time.process_time)
            except (ValueError, RuntimeError) as error:
                rows.append(row(SECTION, size, case.name, name, "compile, ms", note=f"refused: {first_line(error)}"))
                continue
            first, _ = timed(functools.partial(side.first_mask, made), time.process_time)
            last[name] = made
            compiles[name].found[number] = compiled
            firsts[name].found[number] = Seconds(compiled.cpu + first.cpu, compiled.wall + first.wall)
    where = {"section": SECTION, "vocabulary": size, "case": case.name}
    timings = timing_rows(where, "compile, ms", compiles, BASELINE)
    ids = context.tokenizer(size).encode(case.instances(1)[0], add_special_tokens=False)
    for made in timings:
        if not sides[made["side"]].accepts(last[made["side"]], ids):
            made["note"] = "masks a token of a text that matches"
    rows += timings + timing_rows(where, "compile and first mask, ms", firsts, BASELINE)
    for name, compiled in last.items():
        num_bytes = sides[name].num_bytes(compiled)
        if num_bytes is not None:
            rows.append(row(SECTION, size, case.name, name, "automaton, MB", cpu=num_bytes / 1e6))
    return rows


def first_line(error: Exception) -> str:
    """What an error says, on one line of a table."""
    return (str(error).splitlines() or [type(error).__name__])[0][:90]
