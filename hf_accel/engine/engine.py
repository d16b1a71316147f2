"""The engine by hand: requests in, text and tokens out, over one model in this process. Owns the core and its counters."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_accel.config import EngineConfig
from hf_accel.engine import scoring
from hf_accel.engine.async_stream import iterate_in_thread
from hf_accel.engine.core import EngineCore
from hf_accel.engine.executor import Executor, StepResult
from hf_accel.engine.group import OutputGroup, make_output
from hf_accel.engine.model_runner import ModelRunner
from hf_accel.engine.outputs import ContinuationScore, EngineStats, RequestOutput, StreamChunk
from hf_accel.engine.prompts import Prompt, PromptReader
from hf_accel.engine.weights import WeightTracker
from hf_accel.patching.eligibility import model_reason
from hf_accel.patching.registry import ModelSpec, base_model, read_spec
from hf_accel.request import Request, RequestStatus
from hf_accel.sampling_params import SamplingParams

logger = logging.getLogger("hf_accel")


class Engine:
    """Continuous batching over a paged, prefix-sharing KV cache for a HuggingFace causal language model.

    Any number of threads may use it; they share one running batch and one prefix cache. The model is used as it is: no copy of
    the weights, and a change of them is noticed at the next request.

    Args:
        model: a loaded transformers model, or a PEFT model around one.
        tokenizer: needed for text prompts, text outputs and stop strings.
        config: fields of `EngineConfig` as keywords.

    Raises:
        UnsupportedModelError: the model cannot be accelerated; the message says why.
        ValueError: an option is unknown or out of range.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, keep_model: bool = True, spec: ModelSpec | None = None, **config: Any) -> None:
        hf_model = base_model(model)
        self.config = EngineConfig.from_kwargs(**config)
        self.tokenizer = tokenizer
        self._model_ref = weakref.ref(hf_model)
        self._strong_model = hf_model if keep_model else None
        self._tracker = WeightTracker(hf_model)
        self._fallbacks: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._groups: dict[int, OutputGroup] = {}
        self._group_of: dict[int, OutputGroup] = {}
        self._asleep = self._closed = False
        self._build(spec or read_spec(hf_model))

    def _build(self, spec: ModelSpec) -> None:
        runner = ModelRunner(self._model_ref, spec, self.config)
        self.core = EngineCore(Executor(runner), self.config, self._on_step)
        self._prompts = PromptReader(self.tokenizer, self.model, spec, self.core.cache.num_pages * self.config.page_size)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        model = self._model_ref()
        if model is None:
            raise RuntimeError("the engine's model was deleted")
        return model

    # ---- requests ----------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        input_ids: Sequence[int] | torch.Tensor | None = None,
        priority: int = 0,
        cache_salt: Hashable = None,
    ) -> int:
        """Queue a prompt and return its request id; drive it with `step`, `result` or `stream_request`.

        Args:
            prompt: text, token ids, or a chat (list of role/content dicts).
            params: how to sample; default `SamplingParams()`.
            input_ids: token ids instead of a prompt.
            priority: smaller runs first under `policy="priority"`.
            cache_salt: prefixes are shared only between requests of an equal salt.

        Raises:
            ValueError: the prompt is empty, too long for the model or the pool, or holds an id outside the vocabulary.
        """
        params = params or SamplingParams()
        text, token_ids = self._prompts.read(prompt, input_ids, params)
        namespace = (self.begin_call(), cache_salt)
        with self.core.lock:
            group: OutputGroup | None = None
            for index in range(params.n):
                request = self.core.add(lambda rid, i=index: self._make(rid, token_ids, params, namespace, priority, i))
                if group is None:
                    output = make_output(request.request_id, text, list(token_ids), params)
                    group = OutputGroup(output, params, self.tokenizer, skip_special_tokens=True)
                    self._groups[request.request_id] = group
                group.add(request)
                self._group_of[request.request_id] = group
            assert group is not None
            return group.output.request_id

    def _make(self, request_id: int, token_ids: list[int], params: SamplingParams, namespace: Hashable, priority: int, index: int) -> Request:
        seed = params.seed + index if params.seed is not None else int(torch.randint(1 << 62, ()))
        limit = self.core.executor.runner.spec.max_positions
        most = limit if params.max_tokens is None else min(limit, len(token_ids) + params.max_tokens)
        return Request(
            request_id=request_id,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            params=params,
            namespace=namespace,
            max_total_tokens=most,
            eos_token_ids=frozenset() if params.ignore_eos else self._prompts.eos_token_ids,
            seed=seed,
            priority=priority,
            external_sampling=params.max_tokens == 0,
            logits_from=0 if params.prompt_logprobs is not None and index == 0 else None,
        )

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool | None = None
    ) -> list[RequestOutput]:
        """Complete prompts as one continuously batched set; outputs come in the prompts' order.

        Args:
            prompts: one prompt or a list of them (texts, lists of token ids, or chats).
            params: one for all, or one for each.
            use_tqdm: show a progress bar; default: for more than 8 prompts on a terminal.

        Returns:
            One RequestOutput a prompt; one that failed has `error` set and leaves the others untouched.

        Raises:
            ValueError: a prompt or parameter is bad; nothing was queued then.
        """
        batch = self._prompts.as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"got {len(batch)} prompts but {len(each)} SamplingParams: give one, or one for each prompt")
        for prompt, one in zip(batch, each, strict=True):
            self._prompts.read(prompt, None, one or SamplingParams())
        ids: list[int] = []
        disable = (len(batch) <= 8 or None) if use_tqdm is None else not use_tqdm  # None: only on a terminal
        try:
            with tqdm(total=len(batch), disable=disable, desc="generate", unit="prompt") as bar:
                for prompt, one in zip(batch, each, strict=True):
                    ids.append(self.add_request(prompt, one))
                groups = [self._groups[i] for i in ids]
                num_done = 0
                while num_done < len(groups):
                    self.core.drive(lambda seen=num_done: sum(g.output.finished for g in groups) > seen)
                    newly = sum(g.output.finished for g in groups) - num_done
                    num_done += newly
                    bar.update(newly)
            return [g.output for g in groups]
        finally:
            for request_id in ids:
                self._forget(request_id)

    def result(self, request_id: int) -> RequestOutput:
        """Wait for a request that `add_request` queued and hand over its output."""
        group = self._group(request_id)
        try:
            self.core.drive(lambda: group.output.finished)
            return group.output
        finally:
            self._forget(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step by hand; returns (and forgets) the requests that it finished."""
        self.core.step()
        with self.core.lock:
            done = [i for i, g in self._groups.items() if g.output.finished]
            outputs = [self._groups[i].output for i in done]
            for i in done:
                self._forget(i)
        return outputs

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether queued requests are still going."""
        with self.core.lock:
            return any(not g.output.finished for g in self._groups.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[StreamChunk]:
        """Complete one prompt and yield its tokens and text as they come. Leaving the loop aborts the request."""
        yield from self.stream_request(self.add_request(prompt, params, **options))

    def stream_request(self, request_id: int) -> Iterator[StreamChunk]:
        """The chunks of a request that `add_request` queued."""
        group = self._group(request_id)
        news: list[StreamChunk] = []

        def arrived() -> bool:
            news.extend(group.chunks())
            return bool(news)

        try:
            finished = False
            while not finished:
                self.core.drive(arrived)
                batch, news[:] = list(news), []
                finished = group.output.finished and not group.chunks()
                yield from batch
            if group.output.error is not None:
                raise group.output.error
        finally:
            self._forget(request_id)

    def astream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AsyncIterator[StreamChunk]:
        """`stream` for asyncio: steps run in a worker thread, the event loop stays free."""
        return iterate_in_thread(lambda: self.stream(prompt, params, **options))

    def abort(self, request_id: int) -> None:
        """Stop a request; its output ends with finish_reason "abort". Unknown or ended ones are ignored."""
        with self.core.lock:
            group = self._groups.get(request_id)
            for request in group.requests if group else ():
                self.core.finish(request, RequestStatus.ABORTED, "abort")
                group.seal(request)

    def score(self, prefix: Prompt, continuations: Sequence[Prompt], *, cache_salt: Hashable = None) -> list[ContinuationScore]:
        """Log-probabilities of fixed continuations of one prefix, which is computed once and cached.

        Args:
            prefix: text or token ids.
            continuations: texts (tokenized without special tokens) or token ids, not empty.
            cache_salt: as in `add_request`.

        Returns:
            One ContinuationScore for each, in order.
        """
        return scoring.score(self, self._prompts, prefix, continuations, cache_salt)

    # ---- rows of generate calls --------------------------------------------------------------------------------

    def begin_call(self) -> Hashable:
        """Called once at the start of every call: wakes the pool, follows weight changes; returns the KV namespace."""
        if self._closed:
            raise RuntimeError("the engine was shut down: make a new one, or patch the model again")
        with self.core.exclusive():
            if not self.core.executor.runner.matches_model:
                self._rebuild()
            if self._asleep:
                self._wake()
            version = self._tracker.version()
            self.core.executor.runner.prepare(version)
            return version

    def open_row(self, token_ids: list[int], params: SamplingParams, namespace: Hashable, *, max_total_tokens: int, eos: frozenset[int], external: bool, logits_from: int | None = None) -> Request:
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
            seconds = self.core.busy_seconds
            return EngineStats(
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                num_pages_total=cache.stats.num_total,
                num_pages_free=cache.stats.num_free,
                num_pages_cached=cache.stats.num_cached,
                num_prompt_tokens=prompt,
                num_cached_tokens=cached,
                num_generated_tokens=generated,
                num_steps=scheduler.num_steps,
                num_retractions=scheduler.num_retractions,
                num_fallbacks=sum(self._fallbacks.values()),
                fallback_reasons=dict(self._fallbacks),
                cache_hit_rate=cached / prompt if prompt else 0.0,
                tokens_per_second=generated / seconds if seconds else 0.0,
            )

    def flush_cache(self) -> None:
        """Drop every cached prefix. Raises RuntimeError while requests are going."""
        with self._idle("flush_cache"):
            self.core.cache.reset()

    def invalidate_weights(self) -> None:
        """Say that weights were changed in a way that cannot be seen (a single element through `.data`)."""
        with self.core.exclusive():
            self._tracker.invalidate()

    def sleep(self) -> None:
        """Give the KV pool's memory back (and drop the prefix cache). Raises RuntimeError while requests are going."""
        with self._idle("sleep"):
            self.core.cache.reset()
            self.core.executor.runner.pool.release()
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
            self.core.executor.runner.close()
            self._tracker.close()
            self._closed = True

    def check_integrity(self) -> None:
        """Assert every invariant of the scheduler, the pool and the prefix tree."""
        with self.core.exclusive():
            self.core.scheduler.check_integrity()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._asleep:
            self.core.executor.runner.pool.restore()
            self._asleep = False

    def _rebuild(self) -> None:
        """The model moved or changed its dtype: nothing of the old pool is of use."""
        self._fail_all(RuntimeError("the model changed its device or dtype while this request was running"))
        self._asleep = False
        self._totals.update(steps=self.core.scheduler.num_steps)
        self._build(read_spec(self.model))

    def _fail_all(self, error: RuntimeError) -> None:
        for request in list(self.core.requests.values()):
            self.core.finish(request, RequestStatus.FAILED, "error", error)
            group = self._group_of.get(request.request_id)
            if group is not None:
                group.seal(request)

    @contextlib.contextmanager
    def _idle(self, action: str) -> Iterator[None]:
        with self.core.exclusive():
            if self.core.scheduler.running or self.core.scheduler.waiting:
                raise RuntimeError(f"{action} needs an idle engine: wait for the running requests, or abort them")
            yield

    def _on_step(self, request: Request, result: StepResult) -> None:
        group = self._group_of.get(request.request_id)
        if group is None:
            scoring.on_step(request, result)
            return
        if group.on_step(request, result) is not None:
            self.core.finish(request, RequestStatus.FINISHED, "stop")
        if request.awaiting_token:  # max_tokens=0: only its prompt was wanted
            self.core.finish(request, RequestStatus.FINISHED, "length")
        if request.status.ended:
            group.seal(request)

    def _group(self, request_id: int) -> OutputGroup:
        if self._closed:
            raise RuntimeError("the engine was shut down")
        if request_id not in self._groups:
            raise ValueError(f"no request {request_id}: its output was already handed over, or it never was")
        return self._groups[request_id]

    def _forget(self, request_id: int) -> None:
        with self.core.lock:
            group = self._groups.pop(request_id, None)
            if group is not None:
                for request in group.requests:
                    self._group_of.pop(request.request_id, None)
                self.close_rows(group.requests)

    def _count(self, request: Request) -> None:
        if request.request_id in self.core.requests:
            self._totals.update(_counts(request))


def _counts(request: Request) -> dict[str, int]:
    if request.num_cached_tokens is None:
        return {}
    generated = request.num_output_tokens + (request.external_sampling and request.awaiting_token)
    return {"prompt": request.num_prompt_tokens, "cached": request.num_cached_tokens, "generated": generated}
