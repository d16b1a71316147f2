"""`model.generate` on the engine: what replaces HF's `_sample` for a patched model.

Three ways, and never a silent difference: plain greedy calls run natively (rows advance independently, finished ones cost
nothing); calls with processors, criteria, sampling or a streamer run HF's own loop in the caller's thread, on logits that
the engine batches with everybody else's; whatever we cannot honour goes to the original with one log line that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria, PreTrainedModel
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from hf_accel.engine import progress
from hf_accel.engine.engine import Engine
from hf_accel.patching.eligibility import call_reason, model_reason
from hf_accel.request import Request
from hf_accel.sampling_params import SamplingParams

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
    reason = (
        model_reason(model)
        or call_reason(input_ids, generation_config, synced_gpus, model_kwargs)
        or engine.begin_call()
        or _capacity_reason(engine, input_ids, generation_config)
    )
    if reason:
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
    mask = model_kwargs.get("attention_mask")
    prompts = _strip_padding(input_ids, mask)
    new_tokens = generation_config.max_length - input_ids.shape[1]
    native = (
        not logits_processor
        and not generation_config.do_sample
        and streamer is None
        and all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in stopping_criteria)
        and not _wants_scores(generation_config)
    )
    if not native and not engine.fits_at_once([len(p) + new_tokens for p in prompts]):
        reason = "the KV pool cannot hold all rows of the call at once, as its processors or sampling need"
        engine.record_fallback(reason)
        return original(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )
    run = _generate_native if native else _generate_in_lockstep
    call = _Call(engine, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    call.open(prompts, new_tokens, external=not native, eos=_eos_ids(stopping_criteria))
    try:
        result = run(call)
        if not generation_config.return_dict_in_generate:
            return result["sequences"]
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, DynamicCache):
            call.export_cache(cache, result["sequences"].shape[1] - 1)
        return GenerateDecoderOnlyOutput(past_key_values=cache, **result)
    finally:
        call.close()


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
        self.input_ids, self.processors, self.criteria, self.config, self.streamer = (
            input_ids,
            processors,
            criteria,
            config,
            streamer,
        )
        self.rows: list[Request] = []
        pad = config._pad_token_tensor
        self.pad_id: int | None = None if pad is None else int(pad)
        self.has_eos = any(hasattr(c, "eos_token_id") for c in criteria)

    def open(self, prompts: Sequence[list[int]], new_tokens: int, external: bool, eos: frozenset[int]) -> None:
        hold = bool(self.config.return_dict_in_generate)
        for prompt in prompts:
            self.rows.append(
                self.engine.open_row(
                    prompt,
                    GREEDY,
                    max_total_tokens=len(prompt) + new_tokens,
                    eos_token_ids=eos,
                    external=external,
                    hold=hold,
                )
            )

    def close(self) -> None:
        self.engine.close_rows(self.rows)

    def export_cache(self, cache: DynamicCache, length: int) -> None:
        """Fill HF's cache with what its own loop would have left: `length` tokens a row, left-padded."""
        num_prompt = self.input_ids.shape[1]
        pads = [num_prompt - row.num_prompt_tokens for row in self.rows]
        self.engine.export_kv(self.rows, pads, length, cache)


def _generate_native(call: _Call) -> dict[str, Any]:
    """Rows advance on their own; the engine takes the argmax."""
    rows, core = call.rows, call.core
    reported = 0
    while True:
        core.drive(lambda: sum(row.status.ended for row in rows) > reported)
        with core.lock:
            num_ended = sum(row.status.ended for row in rows)
            error = next((row.error for row in rows if row.error is not None), None)
        if error is not None:
            raise error
        progress.report(num_ended - reported)
        reported = num_ended
        if reported == len(rows):
            break
    outputs = [row.token_ids[row.num_prompt_tokens :] for row in rows]
    if any(row.finish_reason == "abort" for row in rows):
        raise RuntimeError("the engine aborted this call's rows (flush_cache, sleep or shutdown from another thread)")
    longest = max(len(o) for o in outputs)
    fill = 0 if call.pad_id is None else call.pad_id
    generated = torch.tensor([o + [fill] * (longest - len(o)) for o in outputs], dtype=call.input_ids.dtype)
    sequences = torch.cat([call.input_ids, generated.to(call.input_ids.device)], dim=-1)
    for criterion in call.criteria:
        if isinstance(criterion, MaxLengthCriteria):
            criterion(sequences[:, :-1], None)  # gives HF's warning past the model's longest position
    return {"sequences": sequences}


def _generate_in_lockstep(call: _Call) -> dict[str, Any]:
    """HF's own loop (processors, sampling, criteria, streamer, in HF's order), on logits from the shared batch."""
    config, device = call.config, call.input_ids.device
    input_ids = call.input_ids
    as_dict = config.return_dict_in_generate
    scores: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_scores else None
    raw_logits: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_logits else None
    keep_finished = _wants_scores(config)  # their scores are returned, so they go on, on padding, as in HF
    unfinished = torch.ones(len(call.rows), dtype=torch.long, device=device)
    last: list[torch.Tensor | None] = [None] * len(call.rows)
    live = list(range(len(call.rows)))
    while True:
        with call.core.next_logits([call.rows[i] for i in live]) as logits:
            for i, row_logits in zip(live, logits, strict=True):
                last[i] = row_logits
            next_token_logits = torch.stack([x for x in last if x is not None]).to(device)
            next_token_scores = call.processors(input_ids, next_token_logits)
            if scores is not None:
                scores += (next_token_scores,)
            if raw_logits is not None:
                raw_logits += (next_token_logits,)
            if config.do_sample:
                probs = nn.functional.softmax(next_token_scores, dim=-1)
                next_tokens = torch.multinomial(probs, num_samples=1).squeeze(1)
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


def _wants_scores(config: GenerationConfig) -> bool:
    return bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))


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


def _capacity_reason(engine: Engine, input_ids: torch.Tensor, config: GenerationConfig) -> str:
    if not engine.fits(config.max_length):
        return f"a row of up to {config.max_length} tokens does not fit in the KV pool ({engine.describe_pool()})"
    limit = engine.core.executor.runner.spec.static_positions
    if limit is not None and config.max_length > limit:
        return f"the model's rope changes past {limit} tokens"
    vocab_size = engine.core.executor.runner.spec.vocab_size
    if input_ids.numel() and (int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab_size):
        return "a token id is out of the vocabulary"  # HF's own error
    return ""
