"""A simulated model and device under a scheduler: what is computed is checked page by page."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hf_accel.config import EngineConfig
from hf_accel.kv_cache.manager import KVCacheManager
from hf_accel.request import Request, RequestStatus
from hf_accel.sampling_params import SamplingParams
from hf_accel.scheduler.output import ScheduledRequest
from hf_accel.scheduler.scheduler import Scheduler

VOCABULARY = 5
EOS = 4


def next_token(token_ids: list[int]) -> int:
    """The simulated model: a fixed function of the history."""
    return hash(tuple(token_ids)) % VOCABULARY


def alone(prompt: list[int], max_new: int, eos: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new:
        tokens.append(next_token(tokens))
        if eos and tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class Guesser:
    """A drafter that is often right."""

    def __init__(self, seed: int, skill: float) -> None:
        self._draws, self._skill = random.Random(seed), skill

    def draft(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        history = list(token_ids)
        for _ in range(self._draws.randint(0, limit)):
            right = self._draws.random() < self._skill
            history.append(next_token(history) if right else self._draws.randrange(EOS))
        return tuple(history[len(token_ids) :])

    def waits(self, token_ids: Sequence[int]) -> bool:
        return self._draws.random() < 0.3


def history_of(item: ScheduledRequest, known: Sequence[int]) -> tuple[int, ...]:
    """A row's tokens in a step: those known, and its guesses."""
    return (*known, *item.token_ids[len(item.token_ids) - item.num_drafted :])


def verified(item: ScheduledRequest, history: Sequence[int]) -> list[int]:
    """What the model says after the known tokens, and after each guess as long as they are right."""
    first = len(history) - item.num_drafted
    found = [next_token(list(history[:first]))]
    while len(found) <= item.num_drafted and history[first + len(found) - 1] == found[-1]:
        found.append(next_token(list(history[: first + len(found)])))
    return found


class Simulation:
    """Drives a scheduler; checks that what it computes was computed in order and on pages that hold the right tokens."""

    def __init__(self, config: EngineConfig, num_pages: int) -> None:
        self.config = config
        self.cache = KVCacheManager(num_pages, config.page_size, config.enable_prefix_cache, config.faults.force_miss)
        self.scheduler = Scheduler(config, self.cache)
        self.pages: list[list[tuple[int, ...] | None]] = [
            [None] * config.page_size for _ in range(num_pages)
        ]  # history
        self.num_copies = 0
        self.tables: dict[int, dict[int, int]] = {}
        self.cohorts: list[list[Request]] = []
        self.requests: dict[int, Request] = {}

    def add(
        self,
        prompt: list[int],
        max_new: int,
        eos: bool,
        *,
        external: bool = False,
        namespace: int = 0,
        skill: float | None = None,
    ) -> Request:
        request = Request(
            request_id=len(self.requests),
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(temperature=0, max_tokens=None),
            namespace=namespace,
            max_total_tokens=len(prompt) + max_new,
            eos_token_ids=frozenset({EOS}) if eos else frozenset(),
            external_sampling=external,
            drafter=None if skill is None or external else Guesser(len(self.requests), skill),
        )
        self.requests[request.request_id] = request
        self.scheduler.add(request)
        return request

    def step(self) -> int:
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        page_size = self.config.page_size
        assert output.num_tokens <= self.config.max_num_batched_tokens
        for source, destination in output.page_copies:
            self.pages[destination] = list(self.pages[source])
        self.num_copies += len(output.page_copies)
        for item in output.requests:  # as on the device: all of a step's tokens are stored before any is attended
            table = self.tables.setdefault(item.slot, {})
            table.update(item.page_updates)
            history = history_of(item, self.requests[item.request_id].token_ids)
            for position in range(item.start, item.start + len(item.token_ids)):
                self.pages[table[position // page_size]][position % page_size] = history[: position + 1]
        sampled = {}
        for item in output.requests:
            request = self.requests[item.request_id]
            table, end = self.tables[item.slot], item.start + len(item.token_ids)
            history = history_of(item, request.token_ids)
            for p in range(end):  # KV depends on all tokens before it
                kept = self.pages[table[p // page_size]][p % page_size]
                assert kept == history[: p + 1], "the pages do not hold the request's tokens"
            if end == len(history) and not request.external_sampling:
                sampled[item.request_id] = verified(item, history)
        self.scheduler.update(output, sampled)
        self.scheduler.check_integrity()
        for cohort in self.cohorts:
            self._sample_cohort(cohort)
        return len(output.requests) + len(output.failed) + len(output.retracted)

    def _sample_cohort(self, cohort: list[Request]) -> None:
        live = [r for r in cohort if not r.status.ended]
        if live and all(r.awaiting_token for r in live):
            for request in live:
                token = next_token(request.token_ids)
                self.scheduler.append_token(request, token)
                if request.num_tokens == request.max_total_tokens or token in request.eos_token_ids:
                    self.scheduler.finish(request, RequestStatus.FINISHED, "length")

    def run(self, max_steps: int = 5000) -> None:
        idle = 0
        for _ in range(max_steps):
            if all(r.status.ended for r in self.requests.values()):
                break
            idle = 0 if self.step() else idle + 1
            assert idle < 3, "a dead stop"
        else:
            raise AssertionError("no end in sight")
        self.cache.check_idle()
