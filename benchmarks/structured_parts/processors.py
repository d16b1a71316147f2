"""The logits processors that are compared, made from what the sides compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.structured_parts.cases import Case
from benchmarks.structured_parts.context import Context
from benchmarks.structured_parts.sides import HfAccel, LLGuidance, Side, constraint_of

Make = Callable[[], Any]
"""Gives a processor at the beginning of a `generate` call."""


def processors(context: Context, sides: dict[str, Side], compiled: dict[str, Any], case: Case) -> dict[str, Make]:
    """How each processor comes to the beginning of a call, by name; only those whose packages are there."""
    made: dict[str, Make] = {"hf_accel processor": our_processor(sides["hf_accel"], case)}
    if context.has("outlines", "outlines_core") and "outlines_core" in compiled:
        from outlines.backends.outlines_core import OutlinesCoreLogitsProcessor

        made["outlines (outlines_core)"] = again(OutlinesCoreLogitsProcessor(compiled["outlines_core"], "torch"))
    if context.has("outlines", "llguidance") and "llguidance" in compiled:
        from outlines.backends.llguidance import LLGuidanceLogitsProcessor

        side = sides["llguidance"]
        assert isinstance(side, LLGuidance)
        processor = LLGuidanceLogitsProcessor(side.grammar(case), side.llg_tokenizer, "torch")
        made["outlines (llguidance)"] = again(processor)
    if context.has("xgrammar") and "xgrammar" in compiled:
        from xgrammar.contrib.hf import LogitsProcessor

        made["xgrammar.contrib.hf"] = lambda: LogitsProcessor(compiled["xgrammar"])
        if context.has("outlines"):
            from outlines.backends.xgrammar import XGrammarLogitsProcessor

            made["outlines (xgrammar)"] = again(XGrammarLogitsProcessor(compiled["xgrammar"], "torch"))
    return made


def our_processor(side: Side, case: Case) -> Make:
    """One object serves any number of calls."""
    from hf_accel.structured.logits_processor import ConstraintLogitsProcessor

    assert isinstance(side, HfAccel)
    processor = ConstraintLogitsProcessor(constraint_of(case), side.tokenizer)
    return lambda: processor


def again(processor: Any) -> Make:
    """The same processor, reset."""

    def make() -> Any:
        processor.reset()
        return processor

    return make
