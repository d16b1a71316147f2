"""`model.generate` on the engine: what replaces HF's `_sample` for a patched model.

Three ways, and never a silent difference: plain greedy calls, constrained or not, run natively (rows advance independently,
finished ones cost nothing); calls with processors, criteria, sampling or a streamer run HF's own loop in the caller's thread, on logits that
the engine batches with everybody else's; whatever we cannot honour goes to the original with one log line that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import EosTokenCriteria, MaxLengthCriteria, PreTrainedModel
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from hf_accel.engine import progress
from hf_accel.engine.engine import Engine
from hf_accel.engine.generate_constraints import ConstraintOfRow, Constraints, constraints_of, note_unfinished
from hf_accel.engine.kv_export import export_kv
from hf_accel.engine.sampled import InvalidLogits
from hf_accel.patching.eligibility import call_reason, model_reason, padding_reason, window_reason
from hf_accel.request import Request
from hf_accel.sampling_params import SamplingParams
from hf_accel_kernels.multinomial import multinomial

logger = logging.getLogger("hf_accel")

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


def sample(
    engine: Engine,
    model: PreTrainedModel,
    original: Callable[..., Any],
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Takes `_sample`'s place: same arguments, same results. `original` is HF's bound `_sample`."""

    def fall_back(reason: str) -> Any:
        engine.record_fallback(reason)
        return original(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    reason = _call_reason(engine, model, input_ids, generation_config, synced_gpus, model_kwargs)
    if reason:
        return fall_back(reason)
    namespace = engine.begin_call()
    prompts = _strip_padding(input_ids, model_kwargs.get("attention_mask"))
    new_tokens = generation_config.max_length - input_ids.shape[1]
    constraints = constraints_of(engine, logits_processor, input_ids, _eos_ids(stopping_criteria))
    native = (
        constraints is not None
        and not generation_config.do_sample
        and not generation_config.return_dict_in_generate
        and streamer is None
        and all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in stopping_criteria)
    )
    reason = _capacity_reason(engine, prompts, new_tokens, all_at_once=not native)
    if reason:
        return fall_back(reason)
    call = _Call(engine, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    call.open(prompts, new_tokens, namespace, constraints if native else None)
    try:
        if native:
            return _generate_native(call)
        result = _generate_in_lockstep(call)
        if not generation_config.return_dict_in_generate:
            return result["sequences"]
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            export_kv(engine, model, call.rows, result["sequences"], model_kwargs.get("attention_mask"), cache)
        return GenerateDecoderOnlyOutput(past_key_values=cache, **result)
    except InvalidLogits:
        pass  # HF goes on with the argmax of NaN, or raises torch's error
    finally:
        engine.close_rows(call.rows)
    return fall_back("the model produced NaN or infinite logits")


def _call_reason(
    engine: Engine,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> str:
    """Why the original must serve this call; "" when the engine can."""
    reason = (
        model_reason(model)
        or call_reason(input_ids, config, synced_gpus, model_kwargs)
        or window_reason(engine.core.executor.runner.spec, model_kwargs.get("attention_mask"))
        or padding_reason(model, input_ids, model_kwargs.get("attention_mask"))
    )
    if reason or config.compile_config is None:
        return reason
    compiles = model._valid_auto_compile_criteria(model_kwargs, config)  # gives HF's warning where it does not
    return "compile_config" if compiles else ""


class _Call:
    """The rows of one `generate` call and what its loop needs."""

    def __init__(
        self,
        engine: Engine,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
    ) -> None:
        self.engine, self.core = engine, engine.core
        self.input_ids = input_ids
        self.processors, self.criteria = processors, criteria
        self.config, self.streamer = config, streamer
        self.rows: list[Request] = []
        pad = config._pad_token_tensor
        self.pad_id: int | None = None if pad is None else int(pad)
        self.has_eos = any(hasattr(c, "eos_token_id") for c in criteria)

    def open(
        self, prompts: Sequence[list[int]], new_tokens: int, namespace: Hashable, constraints: Constraints | None
    ) -> None:
        """Queue one row a prompt: the engine's, under a constraint or None each; the caller's to sample where there are none."""
        eos = _eos_ids(self.criteria)
        with self.core.lock:
            for prompt, one in zip(prompts, constraints or [None] * len(prompts), strict=True):
                row = self.engine.open_row(
                    prompt,
                    GREEDY,
                    (namespace, None),
                    max_total_tokens=len(prompt) + new_tokens,
                    eos=eos,
                    external=constraints is None,
                    constraint=None if one is None else self._open_constraint(one, len(prompt)),
                )
                self.rows.append(row)

    def _open_constraint(self, one: ConstraintOfRow, num_prompt_tokens: int) -> Any:
        closes_at = None if one.max_output is None else num_prompt_tokens + one.max_output
        return self.engine.open_constraint(one.compiled, num_prompt_tokens, closes_at, one.vocabulary)


def _generate_native(call: _Call) -> torch.Tensor:
    """Rows advance on their own; the engine takes the argmax."""
    rows, core = call.rows, call.core
    reported = 0
    with core.driving():
        while reported < len(rows):
            core.drive(lambda seen=reported: sum(row.status.ended for row in rows) > seen)
            with core.lock:
                num_ended = sum(row.status.ended for row in rows)
                error = next((row.error for row in rows if row.error is not None), None)
            if error is not None:
                raise error
            progress.report(num_ended - reported)
            reported = num_ended
    outputs = [row.token_ids[row.num_prompt_tokens :] for row in rows]
    if any(row.finish_reason == "abort" for row in rows):
        raise RuntimeError("the engine aborted this call's rows (flush_cache, sleep or shutdown from another thread)")
    longest = max(len(o) for o in outputs)
    fill = 0 if call.pad_id is None else call.pad_id
    generated = torch.tensor([o + [fill] * (longest - len(o)) for o in outputs])  # int64, as argmax
    sequences = torch.cat([call.input_ids, generated.to(call.input_ids.device)], dim=-1)
    for criterion in call.criteria:
        if isinstance(criterion, MaxLengthCriteria):
            criterion(sequences[:, :-1], None)  # gives HF's warning past the model's longest position
    if any(row.finish_reason == "length" for row in rows):
        note_unfinished(call.processors, sequences, call.input_ids.shape[1])
    return sequences


def _generate_in_lockstep(call: _Call) -> dict[str, Any]:
    """HF's own loop (processors, sampling, criteria, streamer, in HF's order), on logits from the shared batch."""
    config, device = call.config, call.input_ids.device
    input_ids = call.input_ids
    as_dict = config.return_dict_in_generate
    scores: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_scores else None
    raw_logits: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_logits else None
    # As in HF, ended rows go on: on padding, where their scores or KV are returned; on their own tokens without an eos.
    keep_finished = bool(as_dict) or not call.has_eos
    unfinished = torch.ones(len(call.rows), dtype=torch.long, device=device)
    last: list[torch.Tensor | None] = [None] * len(call.rows)
    live = list(range(len(call.rows)))
    while True:
        with call.core.next_logits([call.rows[i] for i in live]) as logits:
            for i, row_logits in zip(live, logits, strict=True):
                last[i] = row_logits
            next_token_logits = torch.stack([x for x in last if x is not None]).to(device)
            if input_ids is call.input_ids and bool(next_token_logits.isnan().any()):
                call.engine.forget_spoilt()
                raise InvalidLogits  # nothing has been drawn, streamed or processed yet
            next_token_scores = call.processors(input_ids, next_token_logits)
            if scores is not None:
                scores += (next_token_scores,)
            if raw_logits is not None:
                raw_logits += (next_token_logits,)
            if config.do_sample:
                probs = nn.functional.softmax(next_token_scores, dim=-1)
                next_tokens = multinomial(probs).squeeze(1)
            else:
                next_tokens = torch.argmax(next_token_scores, dim=-1)
            if call.has_eos:
                next_tokens = next_tokens * unfinished + (call.pad_id or 0) * (1 - unfinished)
            input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
            was_live = unfinished.tolist()
            unfinished = unfinished & ~call.criteria(input_ids, scores)
            if call.streamer is not None:
                call.streamer.put(next_tokens.cpu())
            flags = unfinished.tolist()
            progress.report(sum(was_live) - sum(flags))
            stop = not any(flags)
            if not stop:
                tokens = next_tokens.tolist()
                live = [i for i in live if flags[i] or keep_finished]
                call.core.feed([call.rows[i] for i in live], [tokens[i] for i in live])
        if stop:
            break
    if call.streamer is not None:
        call.streamer.end()
    return {"sequences": input_ids, "scores": scores, "logits": raw_logits}


def _strip_padding(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's real tokens. Masked ones are never attended and take no position, so leaving them out is exact."""
    if mask is None:
        return input_ids.tolist()
    return [row[keep].tolist() for row, keep in zip(input_ids, mask.to(input_ids.device).bool(), strict=True)]


def _eos_ids(criteria: StoppingCriteriaList) -> frozenset[int]:
    ids: set[int] = set()
    for criterion in criteria:
        if isinstance(criterion, EosTokenCriteria):
            ids.update(criterion.eos_token_id.tolist())
    return frozenset(ids)


def _capacity_reason(engine: Engine, prompts: list[list[int]], new_tokens: int, all_at_once: bool) -> str:
    """Why the pool or the fast path's limits cannot take these rows; "" when they can."""
    spec = engine.core.executor.runner.spec
    lengths = [len(p) + new_tokens for p in prompts]
    longest = max(lengths)
    if not engine.fits_at_once([longest]):
        return f"a row of up to {longest} tokens does not fit in the KV pool of {engine.core.cache.num_pages} pages"
    if all_at_once and not engine.fits_at_once(lengths):
        return "the KV pool cannot hold all rows of the call at once, as its processors, sampling or streamer need"
    if spec.static_positions is not None and longest > spec.static_positions:
        return f"the model's rope changes past {spec.static_positions} tokens"
    if not all(prompts):
        return "a row has no unmasked token"
    if any(min(p) < 0 or max(p) >= spec.vocab_size for p in prompts):
        return "a token id is outside the vocabulary"  # the original raises HF's own error
    return ""
