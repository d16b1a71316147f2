"""Who is queued, and how far each request is: the part of the scheduler that takes in what happened.

A step may be planned while launched ones run (`launched`): `num_launched_tokens` and placeholders for the tokens being
sampled run ahead, `num_computed_tokens` and `token_ids` follow with the results (`update`). Pages go to the prefix tree,
and are copied, only as far as the latter, so the former can be taken back at any time (`roll_back`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from hf_accel.config import EngineConfig
from hf_accel.kv_cache.manager import KVCacheManager
from hf_accel.request import Request, RequestStatus
from hf_accel.scheduler.output import ScheduledRequest, SchedulerOutput


class RequestQueue:
    """Waiting and running requests, their slots, their counters and their ends."""

    def __init__(self, config: EngineConfig, cache: KVCacheManager) -> None:
        self.config = config
        self.cache = cache
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.num_retractions = 0
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_arrivals = 0
        self._front = 0
        self._launched: deque[SchedulerOutput] = deque()  # their results are not there yet
        self._need_host: dict[int, Request] = {}  # queued ones that need, or needed, the host between two steps

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to compute."""
        return any(computable(r) for r in self.running.values()) or any(computable(r) for r in self.waiting.values())

    @property
    def may_run_ahead(self) -> bool:
        """Whether nobody in the next step needs the results of the launched ones before it is planned."""
        return not any(r.needs_host and computable(r) for r in self._need_host.values())

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

    # ---- launched steps and results -------------------------------------------------------------------------------

    def launched(self, output: SchedulerOutput) -> None:
        """The step is on the device, behind those launched before: plan on as if it were done."""
        self._launched.append(output)
        for item in output.requests:
            request = self.running.get(item.request_id)
            if request is not None:  # else it was ended while the step was launched
                request.num_launched_tokens = item.start + len(item.token_ids)
                request.num_placeholders += item.at_end
                request.num_drafted = item.num_drafted

    def update(self, output: SchedulerOutput, sampled: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """Take in a step's result: advance its requests, append the tokens of each natively sampled one that reached its end.

        Launched steps come in their order. What was meanwhile ended takes nothing in, what was retracted only its tokens.

        Args:
            output: the step.
            sampled: the tokens of each request: the guesses that held, and the one after them.

        Returns:
            how many tokens each request took in: fewer than were sampled where one of them ended it.
        """
        taken: dict[int, int] = {}
        late = bool(self._launched)
        if late:
            assert self._launched.popleft() is output, "results out of order"
        for item in output.requests:
            request = self.running.get(item.request_id) or self.waiting.get(item.request_id)
            if request is None:
                continue
            if late and item.at_end:
                request.num_placeholders -= 1
                request.num_drafted = 0
            tokens = _until_end(request, sampled.get(item.request_id, ()))
            request.token_ids += tokens[:-1]
            if not late or (request.status is RequestStatus.RUNNING and request.admission == item.admission):
                self._advance(request, item, late, num_held=max(len(tokens) - 1, 0))
            if not item.at_end:
                continue
            if request.external_sampling:
                request.awaiting_token = True
            elif tokens:
                taken[item.request_id] = len(tokens)
                self.append_token(request, tokens[-1])
        return taken

    def _advance(self, request: Request, item: ScheduledRequest, late: bool, num_held: int) -> None:
        """`num_held` of the item's guesses are tokens of the request by now; what was computed for the others is void."""
        num_known = len(item.token_ids) - item.num_drafted
        was_prefill = num_known > 1 or request.num_computed_tokens < request.num_prompt_tokens
        request.num_computed_tokens = item.start + num_known + num_held
        if not late or item.num_drafted:  # a row whose guesses are being verified is in no later step
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
            request.num_placeholders = request.num_drafted = 0
        self.resend_pages(self.running.values())

    def resend_pages(self, requests: Iterable[Request]) -> None:
        """The page table may not have taken a step's changes: send each running row whole with its next step."""
        for request in requests:
            if request.status is RequestStatus.RUNNING:
                request.page_updates = list(enumerate(self.cache.page_ids(request.request_id)))

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _send_back(self, request: Request) -> None:
        """From running to the front of the waiting queue, to be computed anew. What steps in flight sample for it counts."""
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

    def _release_slot(self, request: Request) -> None:
        assert request.slot is not None
        self._free_slots.append(request.slot)
        request.slot = None
        request.page_updates = []

    def check_integrity(self) -> None:
        """Assert that queues, slots and pages agree."""
        self.cache.check_integrity()
        slots = [r.slot for r in self.running.values()]
        assert None not in slots and len(set(slots)) == len(slots), "two running requests share a slot"
        assert len(slots) + len(self._free_slots) == self.config.max_num_seqs, "a slot leaked"
        for request in (*self.running.values(), *self.waiting.values()):
            assert not request.status.ended, f"request {request.request_id} ended but is still queued"
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            most = request.num_planned_tokens + request.num_drafted
            assert request.num_computed_tokens <= request.num_launched_tokens <= most
            assert 0 <= request.num_placeholders <= len(self._launched)
            assert self._launched or request.num_launched_tokens == request.num_computed_tokens, "a lost step"
        if not self.running:
            self.cache.check_idle()


def computable(request: Request) -> bool:
    """Whether a step planned now may compute something for it."""
    if request.num_placeholders:
        # What was retracted waits for its token, and so does a row whose guesses are being verified or may be made when
        # it is known; and a row whose last token is being sampled needs no more steps.
        ahead = request.status is RequestStatus.RUNNING and request.num_planned_tokens < request.max_total_tokens
        if not ahead or request.num_drafted or request.num_pending_tokens <= 0:
            return False
        return request.drafter is None or not request.drafter.waits(request.token_ids)
    return len(request.token_ids) > request.num_launched_tokens and not request.awaiting_token


def _until_end(request: Request, token_ids: Sequence[int]) -> list[int]:
    """Those of some new tokens that come before the request ends, and the one that ends it."""
    params, num_output = request.params, request.num_output_tokens
    most = request.max_total_tokens - request.num_tokens
    for i, token_id in enumerate(token_ids[:most], 1):
        ends = token_id in request.eos_token_ids or token_id in params.stop_token_ids
        if ends and num_output + i >= params.min_tokens:
            return list(token_ids[:i])
    return list(token_ids[:most])
