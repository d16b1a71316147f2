"""outlines on a patched model: its output types become constraints of ours, so that its generators run on our masks.

What we refuse is left to outlines' own processor, with one log line that says why.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from hf_accel.engine.generate_keywords import eos_ids
from hf_accel.patching.registry import UnsupportedModelError
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor
from hf_accel.structured.syntax import StructureError

logger = logging.getLogger("hf_accel")


def processor_for(is_patched: Callable[[Any], bool], outlines_model: Any, output_type: Any) -> Any:
    """The logits processor of an outlines generator; None where outlines shall make its own.

    Args:
        is_patched: whether a model is patched.
        outlines_model: what `outlines.from_transformers` gave.
        output_type: what outlines was asked for: a type, or a term.
    """
    model, tokenizer = (getattr(outlines_model, name, None) for name in ("model", "hf_tokenizer"))
    try:
        if tokenizer is None or not is_patched(model):
            return None
    except UnsupportedModelError:
        return None  # no model of transformers
    dsl = sys.modules["outlines.types.dsl"]
    try:
        term = dsl.python_types_to_terms(output_type)
    except Exception:
        return None  # outlines raises it again
    try:
        constraint = Constraint.of(term)
        return ConstraintLogitsProcessor(constraint, tokenizer, eos_ids(model, {"tokenizer": tokenizer}))
    except StructureError as error:
        logger.warning("hf_accel: outlines' own processor serves this output type: %s", error)
        return None
