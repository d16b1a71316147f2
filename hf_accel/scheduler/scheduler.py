"""Continuous batching: decides what each step computes. The only writer of `Request`. Plain ints; no torch.

There is no prefill and no decode phase: `num_computed_tokens` chases `num_tokens` for every request under one token
budget (vLLM's V1 formulation), so chunked prefill, prefix hits and retraction are the same chase. Pages are asked of the
KVCacheManager; when they run out the newest requests are retracted and recomputed later, mostly from the prefix cache.

A step may be planned while launched ones run (`launched`): `num_launched_tokens` and placeholders for the tokens being
sampled run ahead, `num_computed_tokens` and `token_ids` follow with the results (`update`). Pages go to the prefix tree,
and are copied, only as far as the latter, so the former can be taken back at any time (`roll_back`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from hf_accel.config import EngineConfig
from hf_accel.kv_cache.manager import KVCacheManager
from hf_accel.request import Request, RequestStatus
from hf_accel.scheduler.output import UNKNOWN_TOKEN, ScheduledRequest, SchedulerOutput
from hf_accel.scheduler.policy import order_waiting

INITIAL_RESERVE_RATIO = 0.7
MIN_RESERVE_RATIO = 0.1
RESERVE_DECAY_STEPS = 600
RESERVE_CLIP_TOKENS = 4096


class OutOfPagesError(RuntimeError):
    """The pool cannot hold a request even when it runs alone."""


class Scheduler:
    """Queues, budgets and retraction for one engine. Not thread-safe: the engine holds its lock around every call."""

    def __init__(self, config: EngineConfig, cache: KVCacheManager) -> None:
        self.config = config
        self.cache = cache
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.num_steps = 0
        self.num_retractions = 0
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._reserve_ratio = INITIAL_RESERVE_RATIO
        self._num_arrivals = 0
        self._front = 0
        self._num_admissions = 0
        self._launched: deque[SchedulerOutput] = deque()  # their results are not there yet
        self._need_host: dict[int, Request] = {}  # queued ones that need, or needed, the host between two steps

    # ---- queue -------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to compute."""
        return any(_computable(r) for r in self.running.values()) or any(_computable(r) for r in self.waiting.values())

    @property
    def may_run_ahead(self) -> bool:
        """Whether nobody in the next step needs the results of the launched ones before it is planned."""
        return not any(r.needs_host and _computable(r) for r in self._need_host.values())

    @property
    def is_empty(self) -> bool:
        """Whether no request is queued."""
        return not self.running and not self.waiting

    def add(self, request: Request) -> None:
        """Queue a new request."""
        if request.needs_host:
            self._need_host[request.request_id] = request
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting[request.request_id] = request

    def finish(self, request: Request, status: RequestStatus, reason: str, error: BaseException | None = None) -> None:
        """End a request, once; its pages go back, its computed prefix stays in the cache (not that of a failed one)."""
        if request.status.ended:
            return
        self._need_host.pop(request.request_id, None)
        if request.status is RequestStatus.RUNNING:
            self.cache.free(request, cache=status is not RequestStatus.FAILED)
            del self.running[request.request_id]
            self._release_slot(request)
        else:
            del self.waiting[request.request_id]
        request.status, request.finish_reason, request.error = status, reason, error

    def append_token(self, request: Request, token_id: int) -> None:
        """Append a sampled token and end the request if it is its last one."""
        request.token_ids.append(token_id)
        request.awaiting_token = False
        params = request.params
        if request.external_sampling:
            return
        may_stop = request.num_output_tokens >= params.min_tokens
        if may_stop and (token_id in request.eos_token_ids or token_id in params.stop_token_ids):
            self.finish(request, RequestStatus.FINISHED, "stop")
        elif request.num_tokens >= request.max_total_tokens:
            self.finish(request, RequestStatus.FINISHED, "length")

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's work and give it pages. Changes no token count: that is `launched`'s and `update`'s."""
        self.num_steps += 1
        step = _Step(self.config.max_num_batched_tokens)
        self._inject_faults(step)
        decodes_first = sorted(self.running.values(), key=lambda r: r.num_pending_tokens > 1)
        for request in decodes_first:
            if request.status is RequestStatus.RUNNING and _computable(request) and step.budget > 0:
                self._schedule_running(request, step)
        if not step.retracted:
            self._admit(step)
        if not step.scheduled and not step.failed and not self._launched:  # else their results may change the picture
            self._unblock(step)
        self._reserve_ratio = max(MIN_RESERVE_RATIO, self._reserve_ratio - INITIAL_RESERVE_RATIO / RESERVE_DECAY_STEPS)
        if not self.running and not self.waiting:
            self._reserve_ratio = INITIAL_RESERVE_RATIO
        requests = tuple(step.scheduled.values())
        return SchedulerOutput(
            requests,
            sum(len(r.token_ids) for r in requests),
            tuple(step.retracted),
            tuple(step.failed),
            self.cache.take_page_copies(),
        )

    def launched(self, output: SchedulerOutput) -> None:
        """The step is on the device, behind those launched before: plan on as if it were done."""
        self._launched.append(output)
        for item in output.requests:
            request = self.running.get(item.request_id)
            if request is not None:  # else it was ended while the step was launched
                request.num_launched_tokens = item.start + len(item.token_ids)
                request.num_placeholders += item.at_end

    def update(self, output: SchedulerOutput, sampled: Mapping[int, int]) -> None:
        """Take in a step's result: advance its requests, append the token of each natively sampled one that reached its end.

        Launched steps come in their order. What was meanwhile ended takes nothing in, what was retracted only its token.
        """
        late = bool(self._launched)
        if late:
            assert self._launched.popleft() is output, "results out of order"
        for item in output.requests:
            request = self.running.get(item.request_id) or self.waiting.get(item.request_id)
            if request is None:
                continue
            request.num_placeholders -= late and item.at_end
            if request.status is RequestStatus.RUNNING and request.admission == item.admission:
                self._advance(request, item, late)
            if item.at_end and request.external_sampling:
                request.awaiting_token = True
            elif item.at_end and item.request_id in sampled:
                self.append_token(request, sampled[item.request_id])

    def _advance(self, request: Request, item: ScheduledRequest, late: bool) -> None:
        was_prefill = len(item.token_ids) > 1 or request.num_computed_tokens < request.num_prompt_tokens
        request.num_computed_tokens = item.start + len(item.token_ids)
        if not late:
            request.num_launched_tokens = request.num_computed_tokens
        if request.logits_from is not None:  # those before were handed out: retraction need not compute them again
            request.logits_from = None if item.at_end else max(request.logits_from, request.num_computed_tokens)
        if was_prefill:
            # The runner has the row's table up to date, so a page swapped for the tree's copy must be sent again. A step
            # launched meanwhile reads the page given up: whatever the page gets next is written behind that step.
            request.page_updates.extend(self.cache.commit(request))

    def roll_back(self) -> None:
        """The launched steps are lost: what they were to compute is planned again, and each row's page table sent whole."""
        self._launched.clear()
        for request in (*self.running.values(), *self.waiting.values()):
            request.num_launched_tokens = request.num_computed_tokens
            request.num_placeholders = 0
        self.resend_pages(self.running.values())

    def resend_pages(self, requests: Iterable[Request]) -> None:
        """The page table may not have taken a step's changes: send each running row whole with its next step."""
        for request in requests:
            if request.status is RequestStatus.RUNNING:
                request.page_updates = list(enumerate(self.cache.page_ids(request.request_id)))

    # ---- running requests --------------------------------------------------------------------------------------

    def _schedule_running(self, request: Request, step: _Step) -> None:
        num_tokens = min(request.num_pending_tokens, step.budget, self.config.max_prefill_chunk or step.budget)
        target = request.num_launched_tokens + num_tokens
        updates = self.cache.allocate(request.request_id, target)
        while updates is None:
            victim = self._victim(request, step)
            if victim is None:
                if len(self.running) == 1 and not self._launched:
                    self._fail_out_of_pages(request, step)
                return
            self._retract(victim, step)
            updates = self.cache.allocate(request.request_id, target)
        self._emit(request, num_tokens, updates, step)

    def _emit(self, request: Request, num_tokens: int, updates: tuple[tuple[int, int], ...], step: _Step) -> None:
        start = request.num_launched_tokens
        end = start + num_tokens
        at_end = end == request.num_planned_tokens
        first_logits = end - at_end
        if request.logits_from is not None:
            first_logits = min(first_logits, max(start, request.logits_from))
        assert request.slot is not None
        step.scheduled[request.request_id] = ScheduledRequest(
            request_id=request.request_id,
            slot=request.slot,
            token_ids=tuple(request.token_ids[start:end]) or (UNKNOWN_TOKEN,),
            start=start,
            page_updates=(*request.page_updates, *updates),
            num_logits=end - first_logits,
            at_end=at_end,
            admission=request.admission,
        )
        request.page_updates.clear()
        step.budget -= num_tokens

    def _victim(self, request: Request, step: _Step) -> Request | None:
        """The newest running request that is not in this step; rows that wait for their caller may be older ones."""
        idle = [r for r in self.running.values() if r is not request and r.request_id not in step.scheduled]
        newer = [r for r in idle if r.admission > request.admission or not _computable(r)]
        return max(newer, key=lambda r: r.admission, default=None)

    def retract_all(self) -> None:
        """Send every running request back to be computed from nothing, and empty the prefix cache: what the pages hold
        is unknown."""
        for request in sorted(self.running.values(), key=lambda r: -r.admission):  # the oldest ends up in front
            self._retract(request, None)
        self.cache.reset()

    def _retract(self, request: Request, step: _Step | None) -> None:
        self.cache.free(request)
        del self.running[request.request_id]
        self._release_slot(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = request.num_launched_tokens = 0
        request.num_retractions += 1
        self._front -= 1
        request.arrival = self._front
        self.waiting = {request.request_id: request, **self.waiting}
        self.num_retractions += 1
        self._reserve_ratio = INITIAL_RESERVE_RATIO
        if step is not None:
            step.retracted.append(request.request_id)

    # ---- waiting requests --------------------------------------------------------------------------------------

    def _admit(self, step: _Step) -> None:
        candidates = [r for r in self.waiting.values() if _computable(r)]
        if not candidates or step.budget <= 0 or not self._free_slots:
            return
        reserve = sum(self._reserved_pages(r) for r in self.running.values())
        ordered = order_waiting(self.config.policy, candidates, lambda r: self.cache.match_prefix(r).num_tokens)
        for request in ordered:
            if step.budget <= 0 or not self._free_slots:
                return
            match = self.cache.match_prefix(request)
            if match.in_flight:
                continue
            needed = self.cache.pages_to_admit(request, match) + self._reserved_pages(request)
            if self.running and needed + reserve > self.cache.num_available_pages:
                return
            self._start(request, match.num_tokens, self.cache.admit(request, match))
            self._schedule_running(request, step)
            if request.status is not RequestStatus.RUNNING:
                continue
            reserve += self._reserved_pages(request)

    def _start(self, request: Request, num_cached: int, updates: tuple[tuple[int, int], ...]) -> None:
        del self.waiting[request.request_id]
        self.running[request.request_id] = request
        request.status = RequestStatus.RUNNING
        request.slot = self._free_slots.pop()
        request.num_computed_tokens = request.num_launched_tokens = num_cached
        request.page_updates = list(updates)
        request.admission = self._next_admission()
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_cached

    def _unblock(self, step: _Step) -> None:
        """Nothing could run: take pages from rows that wait for their caller, or fail the request that can never fit."""
        head = next((r for r in self.waiting.values() if _computable(r)), None)
        running = next((r for r in self.running.values() if _computable(r)), None)
        while head is not None and running is None and not step.scheduled and not step.failed:
            idle = max(self.running.values(), key=lambda r: r.admission, default=None)
            if idle is not None:
                self._retract(idle, step)
            num_running = len(self.running)
            self._admit(step)
            if idle is None and not step.scheduled and not step.failed and num_running == len(self.running):
                self._fail_out_of_pages(head, step)

    def _reserved_pages(self, request: Request) -> int:
        """Pages that a request is expected to ask for beyond those of its known tokens."""
        remaining = min(max(0, request.max_total_tokens - request.num_tokens), RESERVE_CLIP_TOKENS)
        return int(remaining * self._reserve_ratio) // self.config.page_size

    # ---- ends --------------------------------------------------------------------------------------------------

    def _fail_out_of_pages(self, request: Request, step: _Step) -> None:
        num_pages, page_size = self.cache.num_pages, self.cache.page_size
        error = OutOfPagesError(
            f"a request of {request.num_tokens} tokens does not fit in the KV pool of {num_pages} pages x {page_size} tokens "
            f"even alone: raise num_pages or memory_fraction, or shorten the prompt or max_tokens"
        )
        self.finish(request, RequestStatus.FAILED, "error", error)
        step.failed.append(request.request_id)

    def _release_slot(self, request: Request) -> None:
        assert request.slot is not None
        self._free_slots.append(request.slot)
        request.slot = None
        request.page_updates = []

    def _next_admission(self) -> int:
        self._num_admissions += 1
        return self._num_admissions

    def _inject_faults(self, step: _Step) -> None:
        every = self.config.faults.retract_every
        if every and self.num_steps % every == 0 and self.running:
            self._retract(max(self.running.values(), key=lambda r: r.admission), None)

    def check_integrity(self) -> None:
        """Assert that queues, slots and pages agree."""
        self.cache.check_integrity()
        slots = [r.slot for r in self.running.values()]
        assert None not in slots and len(set(slots)) == len(slots), "two running requests share a slot"
        assert len(slots) + len(self._free_slots) == self.config.max_num_seqs, "a slot leaked"
        for request in (*self.running.values(), *self.waiting.values()):
            assert not request.status.ended, f"request {request.request_id} ended but is still queued"
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert request.num_computed_tokens <= request.num_launched_tokens <= request.num_planned_tokens
            assert 0 <= request.num_placeholders <= len(self._launched)
            assert self._launched or request.num_launched_tokens == request.num_computed_tokens, "a lost step"
        if not self.running:
            self.cache.check_idle()


class _Step:
    """What one `schedule` call has gathered so far."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.scheduled: dict[int, ScheduledRequest] = {}
        self.retracted: list[int] = []
        self.failed: list[int] = []


def _computable(request: Request) -> bool:
    if request.num_placeholders:
        # What was retracted waits for its token; and a row whose last token is being sampled needs no more steps.
        ahead = request.status is RequestStatus.RUNNING and request.num_planned_tokens < request.max_total_tokens
        return ahead and request.num_pending_tokens > 0
    return request.num_pending_tokens > 0 and not request.awaiting_token
