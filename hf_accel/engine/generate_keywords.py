"""Keywords of ours that a patched model's `generate` takes: constraints on the output, as a logits processor for HF's own paths."""

from __future__ import annotations

from typing import Any

from hf_accel.engine.constraints import constraint_of
from hf_accel.sampling_params import SamplingParams
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor

CONSTRAINTS = ("regex", "json_schema", "choice", "grammar", "json_object")


def with_constraint(model: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """`generate`'s keywords, with a constraint among them turned into a logits processor that comes after the others.

    Raises:
        ValueError: there is more than one constraint, no tokenizer, or the constraint is not supported.
    """
    asked = {name: keywords[name] for name in CONSTRAINTS if name in keywords}
    if not asked:
        return keywords
    constraint = constraint_of(SamplingParams(**asked))
    rest = {name: value for name, value in keywords.items() if name not in CONSTRAINTS}
    if constraint is None:
        return rest
    if rest.get("tokenizer") is None:
        raise ValueError(f"{next(iter(asked))}= needs the tokenizer: model.generate(..., tokenizer=tokenizer)")
    processor = ConstraintLogitsProcessor(constraint, rest["tokenizer"], _eos_ids(model, rest))
    return {**rest, "logits_processor": [*(rest.get("logits_processor") or ()), processor]}


def _eos_ids(model: Any, keywords: dict[str, Any]) -> list[int]:
    """The ids that end this call's outputs."""
    config = keywords.get("generation_config") or model.generation_config
    eos = keywords.get("eos_token_id", config.eos_token_id if config is not None else None)
    if eos is None:
        eos = keywords["tokenizer"].eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else [int(e) for e in eos]
