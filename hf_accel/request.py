"""One request's host state: its tokens and how far they are computed. Written by the Scheduler alone."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_accel.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request stands. A request ends exactly once, in one of the last three."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether the request will never be scheduled again."""
        return self in (RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.FAILED)


class Drafter(Protocol):
    """Guesses how one request goes on. Its guesses are computed beside the last known token, and verified."""

    def draft(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that are likely to follow `token_ids` (prompt and output), all of them known."""
        ...

    def waits(self, token_ids: Sequence[int]) -> bool:
        """Whether, while the token after `token_ids` is being sampled, waiting for it promises more than going on."""
        ...


@dataclass(eq=False)
class Request:
    """A prompt, its output so far, and one counter that chases their length.

    Attributes:
        request_id: unique in its engine.
        token_ids: prompt and output, in order.
        num_prompt_tokens: how many of them are the prompt.
        params: what to sample.
        namespace: radix namespace (weight version, adapter state, user salt): only equal ones share KV.
        max_total_tokens: prompt and output together never exceed this.
        eos_token_ids: ids that end the request (empty when it ignores eos).
        seed: of its own sampling.
        priority: smaller runs first under the "priority" policy.
        external_sampling: the caller samples: logits are handed out, and the next token comes back by `feed`.
        logits_from: first position whose logits are needed (prompt scoring); None: only the last one's.
        num_computed_tokens: tokens whose KV is in the pool: the results of their steps are known to be good.
        num_launched_tokens: those, and the ones after them that launched steps are computing.
        num_placeholders: tokens that launched steps are sampling; they stand after `token_ids` and are not known yet.
        num_drafted: guessed tokens that a launched step verifies; how many of them hold is not known yet.
        num_cached_tokens: tokens that the prefix cache served at the first admission.
        awaiting_token: its logits were handed out and the caller has not fed the next token yet.
        slot: row in the device page table while running.
        admission: order in which it last began to run; the newest is retracted first.
        page_updates: page-table changes that the next step must carry.
        error: why it failed.
        constraint: what its output must satisfy, as the engine's sampler keeps it; nothing to the scheduler.
        host_constraint: whether the host computes what the constraint allows, from all tokens before.
        drafter: who guesses its next tokens; None: nobody.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    namespace: Hashable = None
    max_total_tokens: int = 1 << 30
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    priority: int = 0
    external_sampling: bool = False
    logits_from: int | None = None
    num_computed_tokens: int = 0
    num_launched_tokens: int = 0
    num_placeholders: int = 0
    num_drafted: int = 0
    num_cached_tokens: int | None = None
    awaiting_token: bool = False
    slot: int | None = None
    admission: int = 0
    page_updates: list[tuple[int, int]] = field(default_factory=list, repr=False)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    error: BaseException | None = None
    arrival: int = 0
    num_retractions: int = 0
    page_keys: list[tuple[int, ...]] = field(default_factory=list, repr=False)
    constraint: Any = field(default=None, repr=False)
    host_constraint: bool = False
    drafter: Drafter | None = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_planned_tokens(self) -> int:
        """Known tokens and those being sampled."""
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_pending_tokens(self) -> int:
        """Tokens, known or being sampled, that no step computes yet."""
        return len(self.token_ids) + self.num_placeholders - self.num_launched_tokens

    @property
    def needs_host(self) -> bool:
        """Whether each of its steps must be over before the next is planned: its logits are handed out, or Python
        code chooses from its whole history."""
        needs = self.external_sampling or self.logits_from is not None or self.host_constraint
        return needs or bool(self.params.logits_processors)
