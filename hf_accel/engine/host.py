"""What stands behind every call on an engine: the model, its pool, its weights' version, the rows of `generate` calls.

Owns the core and the counters. Knows nothing of prompts, text or outputs.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_accel.config import EngineConfig
from hf_accel.engine.constraints import RowConstraint, constraint_fields
from hf_accel.engine.core import EngineCore
from hf_accel.engine.dynamic_rows import DynamicConstraint
from hf_accel.engine.executor import Executor, StepResult
from hf_accel.engine.model_runner import ModelRunner
from hf_accel.engine.outputs import EngineStats
from hf_accel.engine.weights import WeightTracker
from hf_accel.patching.eligibility import has_user_hooks, model_reason
from hf_accel.patching.registry import ModelSpec, base_model, read_spec
from hf_accel.request import Request, RequestStatus
from hf_accel.sampling_params import SamplingParams

logger = logging.getLogger("hf_accel")


class EngineHost:
    """Life and load of one engine; `Engine` adds prompts and outputs."""

    def __init__(self, model: Any, config: EngineConfig, *, keep_model: bool, spec: ModelSpec | None) -> None:
        hf_model = base_model(model)
        self.config = config
        self._model_ref = weakref.ref(hf_model)
        self._strong_model = hf_model if keep_model else None  # a patched model must not be kept alive by its engine
        self._tracker = WeightTracker(hf_model)
        self._fallbacks: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._asleep = self._closed = False
        self._num_spoilt = 0
        self._ids = itertools.count()  # outlives the core, so that no two requests of this engine share an id
        self._build(spec or read_spec(hf_model))

    @torch.inference_mode(False)  # a pool made inside inference_mode could not be written outside of it
    def _build(self, spec: ModelSpec) -> None:
        runner = ModelRunner(self._model_ref, spec, self.config)
        self.core = EngineCore(Executor(runner), self.config, self._on_step, self._ids)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.core.executor.runner.model

    # ---- rows of generate calls --------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin_call(self) -> Hashable:
        """Called once at the start of every call: wakes the pool, follows weight changes; returns the KV namespace.

        While forward hooks are registered every call has a namespace of its own: they see each token of the call's
        prompts, and what they change is never served to a later call.
        """
        if self._closed:
            raise RuntimeError("the engine was shut down: make a new one, or patch the model again")
        with self.core.exclusive():
            if not self.core.executor.runner.matches_model:
                self._rebuild()
            if self._asleep:
                self._wake()
            version = self._tracker.version()
            runner = self.core.executor.runner
            if runner.prepare(version):
                self._tracker.accept_move()
            runner.prepare_graphs(self._tracker.layout_version)
            own_call = next(self._ids) if has_user_hooks(self.model) else None
            return (version, self._num_spoilt, own_call)

    def begin_request(self) -> Hashable:
        """`begin_call` for requests that have no original code to fall back to.

        Raises:
            ValueError: the model is in a state that the engine does not run, with the reason.
        """
        reason = model_reason(self.model)
        if reason:
            raise ValueError(
                f"the engine cannot run the model as it is: {reason} (call model.eval(), or use model.generate)"
            )
        return self.begin_call()

    def open_row(
        self,
        token_ids: list[int],
        params: SamplingParams,
        namespace: Hashable,
        *,
        max_total_tokens: int,
        eos: frozenset[int],
        external: bool,
        logits_from: int | None = None,
        constraint: RowConstraint | DynamicConstraint | None = None,
    ) -> Request:
        """Queue one row of a call; `external` rows get their logits by `core.next_logits`. Close it with `close_rows`."""
        return self.core.add(
            lambda rid: Request(
                request_id=rid,
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                params=params,
                namespace=namespace,
                max_total_tokens=max_total_tokens,
                eos_token_ids=eos,
                external_sampling=external,
                logits_from=logits_from,
                **constraint_fields(constraint, may_jump=not external),
            )
        )

    def close_rows(self, rows: Sequence[Request]) -> None:
        """Release rows: what still runs is aborted, what was computed stays in the prefix cache."""
        with self.core.lock:
            for row in rows:
                self._count(row)
            self.core.release(rows)

    def fits_at_once(self, lengths: Iterable[int]) -> bool:
        """Whether sequences of these lengths fit in the pool, and in the running batch, together."""
        pages = [-(-n // self.config.page_size) for n in lengths]
        return sum(pages) <= self.core.cache.num_pages and len(pages) <= self.config.max_num_seqs

    def forget_spoilt(self) -> None:
        """A forward gave NaN: no later call may share its KV. Masked attention carries NaN back to earlier tokens (0 * NaN)."""
        with self.core.lock:
            self._num_spoilt += 1

    def record_fallback(self, reason: str) -> None:
        """Count a call that the original code serves, and say why, once for each reason."""
        with self.core.lock:
            self._fallbacks[reason] += 1
            first = self._fallbacks[reason] == 1
        if first:
            logger.warning("hf_accel: this generate call runs on the original code: %s", reason)

    # ---- control -----------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since the start and the present load."""
        with self.core.lock:
            scheduler, cache = self.core.scheduler, self.core.cache
            totals = Counter(self._totals)
            for request in self.core.requests.values():
                totals.update(_counts(request))
            prompt, cached, generated = totals["prompt"], totals["cached"], totals["generated"]
            seconds, graphs = self.core.busy_seconds, self.core.executor.runner.graphs
            busy, idle = self.core.executor.queue.meter.seconds
            return EngineStats(
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                num_pages_total=cache.stats.num_total,
                num_pages_free=cache.stats.num_free,
                num_pages_cached=cache.stats.num_cached,
                num_prompt_tokens=prompt,
                num_cached_tokens=cached,
                num_generated_tokens=generated,
                num_steps=scheduler.num_steps + totals["steps"],
                num_retractions=scheduler.num_retractions + totals["retractions"],
                num_fallbacks=sum(self._fallbacks.values()),
                fallback_reasons=dict(self._fallbacks),
                cache_hit_rate=cached / prompt if prompt else 0.0,
                tokens_per_second=generated / seconds if seconds else 0.0,
                device_idle_share=idle / (busy + idle) if busy else 0.0,
                num_cuda_graphs=graphs.num_graphs if graphs else 0,
                num_graph_replays=(graphs.num_replays if graphs else 0) + totals["replays"],
                cuda_graph_bytes=graphs.num_bytes if graphs else 0,
            )

    def flush_cache(self) -> None:
        """Drop every cached prefix. Raises RuntimeError while requests are going."""
        with self._idle("flush_cache"):
            self.core.cache.reset()

    def invalidate_weights(self) -> None:
        """Say that weights were changed in a way that cannot be seen (a single element through `.data`)."""
        with self.core.exclusive():
            self._tracker.invalidate()

    @torch.inference_mode(False)
    @torch.no_grad()
    def warmup(self) -> None:
        """Capture the CUDA graphs of all batch sizes now, which takes seconds, instead of one by one when steps first need
        them. Does nothing where there are none. Raises RuntimeError while requests are going."""
        self.begin_request()
        with self._idle("warmup"):
            self.core.executor.runner.warm_up()

    def sleep(self) -> None:
        """Give the memory of the KV pool and the CUDA graphs back (and drop the prefix cache). Raises RuntimeError while requests are going."""
        with self._idle("sleep"):
            self.core.cache.reset()
            runner = self.core.executor.runner
            moves = runner.moved_parameters
            if moves:
                self._tracker.version()  # a change before the move counts
            runner.release()
            if moves:
                self._tracker.accept_move()
            self._asleep = True

    def wake(self) -> None:
        """Take the pool's memory again; the next call does so by itself."""
        with self.core.exclusive():
            self._wake()

    def shutdown(self) -> None:
        """Abort what is going, give the memory back; later calls raise RuntimeError."""
        with self.core.exclusive():
            if self._closed:
                return
            self._fail_all(RuntimeError("the engine was shut down"))
            self.core.cache.reset()
            self.core.executor.close()
            self._tracker.close()
            self._closed = True

    def check_integrity(self) -> None:
        """Assert every invariant of the scheduler, the pool and the prefix tree."""
        with self.core.exclusive():
            self.core.scheduler.check_integrity()

    # ---- inside ------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def _wake(self) -> None:
        if self._asleep:
            self.core.executor.runner.pool.restore()
            self._asleep = False

    def _rebuild(self) -> None:
        """The model moved or changed its dtype: nothing of the old pool is of use."""
        spec, old = read_spec(self.model), self.core
        self._fail_all(RuntimeError("the model changed its device or dtype while this request was running"))
        for request in old.requests.values():
            self._totals.update(_counts(request))
        self._totals.update(steps=old.scheduler.num_steps, retractions=old.scheduler.num_retractions)
        if old.executor.runner.graphs is not None:
            self._totals.update(replays=old.executor.runner.graphs.num_replays)
        old.executor.close()
        self._asleep = False
        self._build(spec)
        self.core.busy_seconds = old.busy_seconds

    def _fail_all(self, error: RuntimeError) -> None:
        for request in list(self.core.requests.values()):
            self.core.finish(request, RequestStatus.FAILED, "error", error)

    @contextlib.contextmanager
    def _idle(self, action: str) -> Iterator[None]:
        with self.core.exclusive():
            if self.core.scheduler.running or self.core.scheduler.waiting:
                raise RuntimeError(f"{action} needs an idle engine: wait for the running requests, or abort them")
            yield

    def _on_step(self, request: Request, result: StepResult) -> None:
        """Called under the lock after each step, with each request of it."""

    def _count(self, request: Request) -> None:
        if request.request_id in self.core.requests:
            self._totals.update(_counts(request))


def _counts(request: Request) -> dict[str, int]:
    if request.num_cached_tokens is None:
        return {}
    generated = request.num_output_tokens + (request.external_sampling and request.awaiting_token)
    return {"prompt": request.num_prompt_tokens, "cached": request.num_cached_tokens, "generated": generated}
