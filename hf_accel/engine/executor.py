"""Runs a step and samples it: batch builder, model runner and sampler behind two calls; or launches it, and hands over its
result later. Owns the device token table, by which the next step knows what this one sampled before the host does."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_accel.engine.device_queue import DeviceQueue, StreamQueue, Ticket, WorkerQueue
from hf_accel.engine.forward_batch import ForwardBatch, ForwardBatchBuilder
from hf_accel.engine.logits_edits import SamplingRow
from hf_accel.engine.model_runner import ModelRunner
from hf_accel.engine.sampled import SampledBatch, SampledToken
from hf_accel.engine.sampler import Sampler
from hf_accel.engine.upload import upload
from hf_accel.request import Request
from hf_accel.scheduler.output import SchedulerOutput


@dataclass
class StepResult:
    """What a step produced, by request id.

    Attributes:
        tokens: sampled tokens, of requests that the engine samples and that reached their end: the guesses that held, and
            the one after them.
        errors: failures of single requests (a processor that raised, NaN logits).
        last_logits: [vocab_size] float32 logits after the last token, of rows that their caller samples.
        prompt_logits: (first position, [n, vocab_size] float32): logits of prompt positions that were asked for.
    """

    tokens: dict[int, list[SampledToken]] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    last_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    prompt_logits: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    """What a step's logits are for, by row of logits. Made on the host before the device runs."""

    sampled: list[tuple[Request, tuple[int, ...]]] = field(default_factory=list)  # with guesses that are verified
    sampling_rows: list[SamplingRow] = field(default_factory=list)  # one each, and one for each guess
    lengths: list[int] = field(default_factory=list)  # tokens before the one to sample, known or not
    indices: list[int] = field(default_factory=list)  # of their logits
    external: list[tuple[int, int]] = field(default_factory=list)  # (request id, row)
    prompt: list[tuple[int, int, slice]] = field(default_factory=list)  # (request id, first position, rows)


class PendingStep:
    """A launched step."""

    def __init__(self, wanted: _Wanted, ticket: Ticket[SampledBatch | None]) -> None:
        self._wanted, self._ticket = wanted, ticket

    def wait(self) -> None:
        """Until the device is through with it, for better or worse."""
        self._ticket.wait()

    def result(self) -> StepResult:
        """What it sampled; raises what went wrong. Waits if need be."""
        sampled, result = self._ticket.result(), StepResult()
        if sampled is not None:
            _enter(self._wanted, sampled.finish(), result)
        return result


class Executor:
    """Mechanism of one engine, on one device.

    Attributes:
        overlaps: whether steps may be launched ahead (`launch`).
        queue: the order of the device's work.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.num_pages = runner.num_pages
        config, device = runner.config, runner.device
        self.overlaps = config.overlap is True or (config.overlap == "auto" and device.type == "cuda")
        self.queue: DeviceQueue = StreamQueue(device) if device.type == "cuda" else WorkerQueue()
        self.builder = ForwardBatchBuilder(
            config.max_num_seqs,
            config.page_size,
            device,
            token_table=self.overlaps,
            buffers=runner.graphs.buffers if runner.graphs is not None else None,
        )
        self.sampler = Sampler()
        # One row a request over its own growing token list: penalties then count only what is new.
        self._rows: weakref.WeakKeyDictionary[Request, SamplingRow] = weakref.WeakKeyDictionary()
        self._token_table = torch.zeros(config.max_num_seqs if self.overlaps else 0, dtype=torch.long, device=device)

    def build(self, output: SchedulerOutput) -> ForwardBatch:
        """The step's tensors; also takes over its page-table changes."""
        return self.builder.build(output)

    def copy_pages(self, page_copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination) in all layers, as if one after the other, behind all that was launched."""
        self.queue.run(lambda: self.runner.pool.copy_pages(page_copies))

    @torch.inference_mode(False)  # the caller's mode must not mark the pool, the buffers or another caller's logits
    @torch.no_grad()
    def execute(self, batch: ForwardBatch, requests: Sequence[Request]) -> StepResult:
        """Forward and sample, and wait for the end. Reads the requests; writes none."""
        wanted, result = self._wanted(batch, requests), StepResult()
        logits, tokens = self.queue.run(lambda: self._compute(batch, wanted))
        result.last_logits = {request_id: logits[row] for request_id, row in wanted.external}
        result.prompt_logits = {request_id: (first, logits[rows]) for request_id, first, rows in wanted.prompt}
        _enter(wanted, tokens, result)
        return result

    def launch(self, batch: ForwardBatch, requests: Sequence[Request]) -> PendingStep:
        """Queue forward and sampling, and do not wait. What raises here was not launched, or only in part: its step
        counts for nothing, and no other may be launched before those in flight are over.

        Args:
            batch: its unknown tokens are read from the token table when its turn comes.
            requests: the batch's, none of which `needs_host`. Read here and now; none is written.
        """
        assert self.overlaps
        wanted = self._wanted(batch, requests)
        assert not wanted.external and not wanted.prompt, "a step that must be over before the next one is planned"
        return PendingStep(wanted, self.queue.submit(lambda: self._compute_ahead(batch, wanted)))

    def close(self) -> None:
        """Give every byte and thread back; the executor is of no use afterwards."""
        self.queue.close()
        self.runner.close()

    def _compute(self, batch: ForwardBatch, wanted: _Wanted) -> tuple[torch.Tensor, list[SampledToken]]:
        logits = self.runner.forward(batch)
        if not wanted.indices:
            return logits, []
        own, rows = _rows_of(logits, wanted.indices), wanted.sampling_rows
        owned = own is not logits or not wanted.prompt
        if not batch.drafts_cpu:
            return logits, self.sampler.sample(own, rows, owned=owned)
        return logits, self.sampler.begin(own, rows, wanted.lengths, owned=owned).finish()

    @torch.inference_mode(False)  # a thread of its own starts with torch's defaults
    @torch.no_grad()
    def _compute_ahead(self, batch: ForwardBatch, wanted: _Wanted) -> SampledBatch | None:
        """On CUDA nothing here waits for the device."""
        table, slots = self._token_table, batch.token_slots
        assert slots is not None
        batch.upload()
        if batch.has_unknown:
            known = torch.where(batch.input_ids < 0, table.index_select(0, slots), batch.input_ids)
            batch = replace(batch, input_ids=known)
        logits = self.runner.forward(batch)
        if not wanted.indices:
            return None
        logits = _rows_of(logits, wanted.indices)
        sampled = self.sampler.begin(logits, wanted.sampling_rows, wanted.lengths, ahead=True, owned=True)
        last_tokens = _rows_of(batch.logits_indices, wanted.indices)
        table.index_copy_(0, slots.index_select(0, last_tokens), sampled.token_ids)
        return sampled.to_host()

    def _wanted(self, batch: ForwardBatch, requests: Sequence[Request]) -> _Wanted:
        wanted, row = _Wanted(), 0
        drafts = batch.drafts_cpu or ((),) * len(requests)
        items = zip(requests, batch.seq_lens_cpu, batch.num_logits_cpu, drafts, strict=True)
        for request, seq_len, num_logits, draft in items:
            num_logits -= len(draft)
            seq_len -= len(draft)
            last = row + num_logits - 1
            at_end = num_logits > 0 and seq_len == len(request.token_ids) + request.num_placeholders
            if request.logits_from is not None and num_logits:
                wanted.prompt.append((request.request_id, seq_len - num_logits, slice(row, row + num_logits)))
            if at_end and request.external_sampling:
                wanted.external.append((request.request_id, last))
            elif at_end:
                own = self._sampling_row(request)
                if not request.num_placeholders:
                    own.settle()
                wanted.sampled.append((request, draft))
                wanted.sampling_rows.extend((own, *own.after(draft)))
                wanted.lengths.extend(range(seq_len, seq_len + len(draft) + 1))
                wanted.indices.extend(range(last, last + len(draft) + 1))
            row += num_logits + len(draft)
        return wanted

    def _sampling_row(self, request: Request) -> SamplingRow:
        row = self._rows.get(request)
        if row is None:
            row = SamplingRow(
                request.params, request.token_ids, request.num_prompt_tokens, request.seed, request.eos_token_ids
            )
            row.constraint = request.constraint
            self._rows[request] = row
        return row


def _rows_of(values: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Rows of `values` in ascending order; itself for all of them."""
    if len(indices) == values.shape[0]:
        return values
    return values.index_select(0, upload(indices, torch.long, values.device))


def _enter(wanted: _Wanted, tokens: Sequence[SampledToken], result: StepResult) -> None:
    """Keep of each request's tokens those that were sampled after right guesses."""
    first = 0
    for request, draft in wanted.sampled:
        own = tokens[first : first + len(draft) + 1]
        first += len(own)
        num_held = next((i for i, guess in enumerate(draft) if own[i].token_id != guess), len(draft))
        error = own[num_held].error
        if error is not None:
            result.errors[request.request_id] = error
        else:
            result.tokens[request.request_id] = list(own[: num_held + 1])
