"""Which prompts may share one `generate` call so that each one keeps the answer it would get alone.

A shared call pads on the left. The engine removes the padding again, so the model never sees it, but some generation
parameters count positions or read the history of the padded row. Knows neither pipelines nor engines.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import RepetitionPenaltyLogitsProcessor


class Grouping(enum.Enum):
    """How much of a list can go into one call."""

    TOGETHER = "prompts of any length"
    EQUAL_LENGTH = "prompts of one length: padding would change what a parameter means"
    ALONE = "one prompt: a parameter belongs to a whole call"


BY_ROW = frozenset({
    "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values", "suppress_tokens", "stop_strings",
    "num_return_sequences", "eos_token_id", "pad_token_id", "bos_token_id", "tokenizer", "prefix_length",
    "prefill_chunk_size", "max_cache_len", "cache_config", "compile_config", "disable_compile",
    "regex", "json_schema", "choice", "grammar", "json_object", "constraint",
})  # fmt: skip
"""Parameters that act on each row's own logits or new tokens."""

BY_POSITION = frozenset({
    "max_length", "min_length", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "watermarking_config",
})  # fmt: skip
"""Parameters that count the row's length or read its history, padding included."""

NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1, "use_cache": True, "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
    "output_attentions": False, "output_hidden_states": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "guidance_scale": 1.0,
    "cache_implementation": "dynamic", "token_healing": False, "low_memory": False, "is_assistant": False,
}  # fmt: skip
"""Values that ask for nothing."""

IDLE = frozenset({
    "transformers_version", "generation_config", "_from_model_config",
    "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size",
})  # fmt: skip
"""What matters only beside another parameter (beams, an assistant), which keeps the prompt alone by itself."""


def grouping_of(params: Mapping[str, Any]) -> Grouping:
    """The widest grouping that keeps the meaning of these generation parameters; an unknown one is kept ALONE."""
    result = Grouping.TOGETHER
    for name, value in params.items():
        if value is None or name in IDLE or (name in NEUTRAL and NEUTRAL[name] == value):
            continue
        if name == "max_length" and params.get("max_new_tokens") is not None:
            continue  # HF lets max_new_tokens decide
        if name == "repetition_penalty" and _penalty_skips_padding():
            continue
        if name in BY_POSITION:
            result = Grouping.EQUAL_LENGTH
        elif name not in BY_ROW:
            return Grouping.ALONE
    if params.get("stop_strings") is not None and params.get("eos_token_id") is None:
        return Grouping.ALONE  # without an eos HF does not pad finished rows: their ends would be lost
    return result


def make_groups(lengths: Sequence[int], how: Grouping) -> list[list[int]]:
    """Split prompts `0 .. len(lengths) - 1` into calls; empty prompts go alone."""
    groups: dict[object, list[int]] = {}
    for index, length in enumerate(lengths):
        if how is Grouping.ALONE or length == 0:
            key: object = ("alone", index)
        else:
            key = length if how is Grouping.EQUAL_LENGTH else "together"
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _penalty_skips_padding() -> bool:
    parameter = inspect.signature(RepetitionPenaltyLogitsProcessor.__init__).parameters.get("prompt_ignore_length")
    return parameter is not None and "Tensor" in str(parameter.annotation)
