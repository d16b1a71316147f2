"""Continuous batching: decides what each step computes. The only writer of `Request`, with `RequestQueue`. Plain ints; no torch.

There is no prefill and no decode phase: `num_computed_tokens` chases `num_tokens` for every request under one token
budget (vLLM's V1 formulation), so chunked prefill, prefix hits and retraction are the same chase. Pages are asked of the
KVCacheManager; when they run out the newest requests are retracted and recomputed later, mostly from the prefix cache.
Who is queued and what results say is `RequestQueue`'s part.
"""

from __future__ import annotations

from hf_accel.config import EngineConfig
from hf_accel.kv_cache.manager import KVCacheManager
from hf_accel.request import Request, RequestStatus
from hf_accel.scheduler.output import UNKNOWN_TOKEN, ScheduledRequest, SchedulerOutput
from hf_accel.scheduler.policy import order_waiting
from hf_accel.scheduler.queues import RequestQueue, computable

INITIAL_RESERVE_RATIO = 0.7
MIN_RESERVE_RATIO = 0.1
RESERVE_DECAY_STEPS = 600
RESERVE_CLIP_TOKENS = 4096
MAX_DRAFT_TOKENS = 16


class OutOfPagesError(RuntimeError):
    """The pool cannot hold a request even when it runs alone."""


class Scheduler(RequestQueue):
    """Queues, budgets and retraction for one engine. Not thread-safe: the engine holds its lock around every call."""

    def __init__(self, config: EngineConfig, cache: KVCacheManager) -> None:
        super().__init__(config, cache)
        self.num_steps = 0
        self._reserve_ratio = INITIAL_RESERVE_RATIO
        self._num_admissions = 0

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's work and give it pages. Changes no token count: that is `launched`'s and `update`'s."""
        self.num_steps += 1
        step = _Step(self.config.max_num_batched_tokens)
        self._inject_faults(step)
        decodes_first = sorted(self.running.values(), key=_is_prefill)
        for request in decodes_first:
            if request.status is RequestStatus.RUNNING and computable(request) and step.budget > 0:
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
        draft = self._draft(request, num_tokens, step)
        if draft:
            more = self.cache.allocate(request.request_id, target + len(draft))
            updates, draft = ((*updates, *more), draft) if more is not None else (updates, ())
        self._emit(request, num_tokens, updates, step, draft)

    def _draft(self, request: Request, num_tokens: int, step: _Step) -> tuple[int, ...]:
        """Guesses of what follows, of a request whose tokens are all known and computed with this step. They take only
        what the others leave of the budget."""
        drafter = request.drafter
        if drafter is None or request.num_placeholders or request.logits_from is not None:
            return ()
        limit = min(
            MAX_DRAFT_TOKENS,
            step.budget - num_tokens - len(self.running),
            request.max_total_tokens - request.num_tokens - 1,
        )
        if limit <= 0 or num_tokens < request.num_pending_tokens:
            return ()
        return drafter.draft(request.token_ids, limit)

    def _emit(
        self,
        request: Request,
        num_tokens: int,
        updates: tuple[tuple[int, int], ...],
        step: _Step,
        draft: tuple[int, ...],
    ) -> None:
        start = request.num_launched_tokens
        end = start + num_tokens
        at_end = end == len(request.token_ids) + request.num_placeholders
        first_logits = end - at_end
        if request.logits_from is not None:
            first_logits = min(first_logits, max(start, request.logits_from))
        assert request.slot is not None
        step.scheduled[request.request_id] = ScheduledRequest(
            request_id=request.request_id,
            slot=request.slot,
            token_ids=(tuple(request.token_ids[start:end]) or (UNKNOWN_TOKEN,)) + draft,
            start=start,
            page_updates=(*request.page_updates, *updates),
            num_logits=end - first_logits + len(draft),
            at_end=at_end,
            admission=request.admission,
            num_drafted=len(draft),
        )
        request.page_updates.clear()
        step.budget -= num_tokens + len(draft)

    def _victim(self, request: Request, step: _Step) -> Request | None:
        """The newest running request that is not in this step; rows that wait for their caller may be older ones."""
        idle = [r for r in self.running.values() if r is not request and r.request_id not in step.scheduled]
        newer = [r for r in idle if r.admission > request.admission or not computable(r)]
        return max(newer, key=lambda r: r.admission, default=None)

    def retract_all(self) -> None:
        """Send every running request back to be computed from nothing, and empty the prefix cache: what the pages hold
        is unknown."""
        for request in sorted(self.running.values(), key=lambda r: -r.admission):  # the oldest ends up in front
            self._retract(request, None)
        self.cache.reset()

    def _retract(self, request: Request, step: _Step | None) -> None:
        self._send_back(request)
        self._reserve_ratio = INITIAL_RESERVE_RATIO
        if step is not None:
            step.retracted.append(request.request_id)

    # ---- waiting requests --------------------------------------------------------------------------------------

    def _admit(self, step: _Step) -> None:
        candidates = [r for r in self.waiting.values() if computable(r)]
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
        head = next((r for r in self.waiting.values() if computable(r)), None)
        running = next((r for r in self.running.values() if computable(r)), None)
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

    def _next_admission(self) -> int:
        self._num_admissions += 1
        return self._num_admissions

    def _inject_faults(self, step: _Step) -> None:
        every = self.config.faults.retract_every
        if every and self.num_steps % every == 0 and self.running:
            self._retract(max(self.running.values(), key=lambda r: r.admission), None)


class _Step:
    """What one `schedule` call has gathered so far."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.scheduled: dict[int, ScheduledRequest] = {}
        self.retracted: list[int] = []
        self.failed: list[int] = []


def _is_prefill(request: Request) -> bool:
    return len(request.token_ids) + request.num_placeholders > request.num_launched_tokens + 1
