"""Keywords of ours that a patched model's `generate` takes: constraints on the output, as a logits processor for all of HF's paths.

Owns how one keyword gives a constraint to each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_accel.engine.constraints import CONSTRAINTS, constraint_from
from hf_accel.structured.constraint import Constraint
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor

OURS = (*CONSTRAINTS, "close_within_budget")


def with_constraint(model: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """`generate`'s keywords, with constraints among them turned into a logits processor that comes after the others.

    Raises:
        ValueError: there is more than one constraint for a prompt, no tokenizer, or a constraint is not supported, or cannot
            be satisfied within the budget.
    """
    asked = {name: keywords[name] for name in CONSTRAINTS if name in keywords}
    rest = {name: value for name, value in keywords.items() if name not in OURS}
    closes = bool(keywords.get("close_within_budget"))
    if not asked:
        if closes:
            raise ValueError("close_within_budget needs a constraint: regex=, json_schema=, choice=, ...")
        return rest
    length = num_prompts(asked)
    _check_length(length, rest.get("input_ids", rest.get("inputs")))
    each = [_one(of_prompts(asked, [i])) for i in range(1 if length is None else length)]
    if not any(each):
        return rest
    if rest.get("tokenizer") is None:
        raise ValueError(f"{next(iter(asked))}= needs the tokenizer: model.generate(..., tokenizer=tokenizer)")
    budget = _budget(model, rest) if closes else {}
    processor = ConstraintLogitsProcessor(each, rest["tokenizer"], eos_ids(model, rest), **budget)
    return {**rest, "logits_processor": [*(rest.get("logits_processor") or ()), processor]}


def _budget(model: Any, keywords: dict[str, Any]) -> dict[str, int]:
    """`max_new_tokens`, or else `max_length`, as HF finds them."""
    for name in ("max_new_tokens", "max_length"):
        for source in (keywords, keywords.get("generation_config"), model.generation_config):
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if value is not None:
                return {name: value}
    raise ValueError("close_within_budget needs a budget: model.generate(..., max_new_tokens=n)")


def num_prompts(asked: Mapping[str, Any]) -> int | None:
    """For how many prompts these keywords have a list of constraints; None where they have one for all.

    Raises:
        ValueError: they have lists of different lengths.
    """
    lengths = {len(value) for name, value in asked.items() if is_list(name, value)}
    if len(lengths) > 1:
        raise ValueError(f"lists of constraints must have one for each prompt, got lists of {sorted(lengths)}")
    return lengths.pop() if lengths else None


def of_prompts(keywords: Mapping[str, Any], indices: Sequence[int], first: int = 0) -> dict[str, Any]:
    """Keywords for some prompts, counted from `first`: of lists of constraints, their elements.

    Raises:
        ValueError: a list ends before.
    """
    found = dict(keywords)
    for name, value in keywords.items():
        if is_list(name, value):
            if first + max(indices) >= len(value):
                raise ValueError(f"{name}= is a list of {len(value)} constraints, and there are more prompts")
            found[name] = [value[first + i] for i in indices]
    return found


def is_list(name: str, value: Any) -> bool:
    """Whether a keyword's value has one constraint for each prompt. A choice is a list itself: then it is a list of such."""
    if name not in CONSTRAINTS or not isinstance(value, (list, tuple)):
        return False
    return name != "choice" or any(v is None or not isinstance(v, str) for v in value)


def _check_length(length: int | None, prompts: Any) -> None:
    if length == 0:
        raise ValueError("the list of constraints is empty: give one (or None) for each prompt")
    num = len(prompts) if getattr(prompts, "ndim", 0) == 2 else length
    if length is not None and length != num:
        raise ValueError(f"got a list of {length} constraints for {num} prompts: give one (or None) for each")


def _one(asked: Mapping[str, Any]) -> Constraint | None:
    """The constraint of one prompt."""
    asked = {name: value[0] if is_list(name, value) else value for name, value in asked.items()}
    given = [name for name, value in asked.items() if value is not None and value is not False]
    if len(given) > 1:
        raise ValueError(f"give only one of {' and '.join(given)} for a prompt")
    return constraint_from(asked)


def eos_ids(model: Any, keywords: dict[str, Any]) -> list[int]:
    """The ids that end this call's outputs."""
    configs = (keywords.get("generation_config"), model.generation_config)  # HF fills what the first leaves out
    eos = keywords.get("eos_token_id")
    for config in configs:
        eos = getattr(config, "eos_token_id", None) if eos is None else eos
    if eos is None:
        eos = keywords["tokenizer"].eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else [int(e) for e in eos]
