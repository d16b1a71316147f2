"""Runs a step and samples it: batch builder, model runner and sampler behind two calls."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_accel.engine.forward_batch import ForwardBatch, ForwardBatchBuilder
from hf_accel.engine.model_runner import ModelRunner
from hf_accel.engine.sampler import SampledToken, Sampler, SamplingRow
from hf_accel.request import Request
from hf_accel.scheduler.output import SchedulerOutput


@dataclass
class StepResult:
    """What a step produced, by request id.

    Attributes:
        tokens: sampled tokens, of requests that the engine samples and that reached their end.
        errors: failures of single requests (a processor that raised, NaN logits).
        last_logits: [vocab_size] float32 logits after the last token, of rows that their caller samples.
        prompt_logits: (first position, [n, vocab_size] float32): logits of prompt positions that were asked for.
    """

    tokens: dict[int, SampledToken] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    last_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    prompt_logits: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)


class Executor:
    """Mechanism of one engine, on one device."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.num_pages = runner.num_pages
        buffers = runner.graphs.buffers if runner.graphs is not None else None
        self.builder = ForwardBatchBuilder(runner.config.max_num_seqs, runner.config.page_size, runner.device, buffers)
        self.sampler = Sampler()
        # One row a request over its own growing token list: penalties then count only what is new.
        self._rows: weakref.WeakKeyDictionary[Request, SamplingRow] = weakref.WeakKeyDictionary()

    def build(self, output: SchedulerOutput) -> ForwardBatch:
        """The step's tensors; also takes over its page-table changes."""
        return self.builder.build(output)

    def copy_pages(self, page_copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination) in all layers, as if one after the other."""
        self.runner.pool.copy_pages(page_copies)

    @torch.inference_mode(False)  # the caller's mode must not mark the pool, the buffers or another caller's logits
    @torch.no_grad()
    def execute(self, batch: ForwardBatch, requests: Sequence[Request]) -> StepResult:
        """Forward and sample. Reads the requests; writes none."""
        logits = self.runner.forward(batch)
        result = StepResult()
        sampled_requests: list[Request] = []
        sampled_rows: list[int] = []
        row = 0
        for request, seq_len, num_logits in zip(requests, batch.seq_lens_cpu, batch.num_logits_cpu, strict=True):
            last = row + num_logits - 1
            at_end = num_logits > 0 and seq_len == request.num_tokens
            if request.logits_from is not None and num_logits:
                result.prompt_logits[request.request_id] = (seq_len - num_logits, logits[row : row + num_logits])
            if at_end and request.external_sampling:
                result.last_logits[request.request_id] = logits[last]
            elif at_end:
                sampled_requests.append(request)
                sampled_rows.append(last)
            row += num_logits
        if sampled_requests:
            whole = len(sampled_rows) == logits.shape[0]
            self._sample(logits if whole else logits[sampled_rows], sampled_requests, result)
        return result

    def _sample(self, logits: torch.Tensor, requests: list[Request], result: StepResult) -> None:
        rows = [self._sampling_row(request) for request in requests]
        for request, token in zip(requests, self.sampler.sample(logits, rows), strict=True):
            if token.error is not None:
                result.errors[request.request_id] = token.error
            else:
                result.tokens[request.request_id] = token

    def _sampling_row(self, request: Request) -> SamplingRow:
        row = self._rows.get(request)
        if row is None:
            row = SamplingRow(
                request.params, request.token_ids, request.num_prompt_tokens, request.seed, request.eos_token_ids
            )
            self._rows[request] = row
        return row
