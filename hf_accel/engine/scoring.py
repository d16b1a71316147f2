"""Scores fixed continuations of a cached prefix: only the continuations are computed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.engine.executor import StepResult
from hf_accel.engine.outputs import ContinuationScore
from hf_accel.engine.prompts import Prompt, PromptReader
from hf_accel.request import Request
from hf_accel.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hf_accel.engine.engine import Engine


class _ScoreCollector(SamplingParams):
    """Parameters of a scoring row; its token log-probabilities gather here by position."""

    found: dict[int, tuple[float, bool]]


def score(
    engine: Engine, reader: PromptReader, prefix: Prompt, continuations: Sequence[Prompt], salt: Hashable
) -> list[ContinuationScore]:
    """See `Engine.score`."""
    base = reader.read(prefix, None, SamplingParams())[1]
    rows: list[Request] = []
    namespace = (engine.begin_request(), salt)
    tails = [reader.encode(c, add_special_tokens=False) for c in continuations]
    for tail in tails:
        if not tail:
            raise ValueError("a continuation is empty: give at least one token to score")
        reader.read(None, base + tail, SamplingParams())
    try:
        for tail in tails:
            params = _ScoreCollector(temperature=0.0, max_tokens=None)
            object.__setattr__(params, "found", {})
            ids = base + tail
            rows.append(
                engine.open_row(
                    ids,
                    params,
                    namespace,
                    max_total_tokens=len(ids) + 1,
                    eos=frozenset(),
                    external=True,
                    logits_from=len(base) - 1,
                )
            )
        engine.core.drive(lambda: all(row.awaiting_token or row.status.ended for row in rows))
        scores = [_collect(row, len(base)) for row in rows]
        if any(math.isnan(s.total) for s in scores):
            engine.forget_spoilt()
        return scores
    finally:
        engine.close_rows(rows)


def on_step(request: Request, result: StepResult) -> None:
    """Take in the logits of a scoring row's step; other rows are ignored."""
    params: Any = request.params
    if not isinstance(params, _ScoreCollector) or request.request_id not in result.prompt_logits:
        return
    first, logits = result.prompt_logits[request.request_id]
    targets = request.token_ids[first + 1 : first + 1 + logits.shape[0]]
    if not targets:
        return
    logprobs = torch.log_softmax(logits[: len(targets)].float(), dim=-1)
    ids = torch.tensor(targets, device=logits.device)
    own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    greedy = (logprobs.argmax(-1) == ids).tolist()
    for offset, pair in enumerate(zip(own, greedy, strict=True)):
        params.found[first + 1 + offset] = pair


def _collect(row: Request, num_prefix: int) -> ContinuationScore:
    if row.error is not None:
        raise row.error
    found: dict[int, tuple[float, bool]] = row.params.found  # type: ignore[attr-defined]
    pairs = [found[i] for i in range(num_prefix, row.num_prompt_tokens)]
    logprobs = [p for p, _ in pairs]
    return ContinuationScore(logprobs, sum(logprobs), all(g for _, g in pairs), row.num_cached_tokens or 0)
