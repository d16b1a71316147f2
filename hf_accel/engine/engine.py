"""The engine by hand: prompts in, text and tokens out, over one model in this process. Owns the outputs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_accel.config import EngineConfig
from hf_accel.engine import scoring
from hf_accel.engine.async_stream import iterate_in_thread
from hf_accel.engine.constraints import EngineConstraints, RowConstraint, constraint_fields
from hf_accel.engine.dynamic_rows import DynamicConstraint
from hf_accel.engine.executor import StepResult
from hf_accel.engine.group import OutputGroup, make_output
from hf_accel.engine.host import EngineHost
from hf_accel.engine.outputs import ContinuationScore, RequestOutput, StreamChunk
from hf_accel.engine.prompts import Prompt, PromptReader
from hf_accel.engine.sampled import InvalidLogits
from hf_accel.patching.registry import ModelSpec
from hf_accel.request import Request, RequestStatus
from hf_accel.sampling_params import SamplingParams
from hf_accel.structured.compiler import Compiled
from hf_accel.structured.vocabulary import Vocabulary


class Engine(EngineHost):
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

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        keep_model: bool = True,
        spec: ModelSpec | None = None,
        **config: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self._groups: dict[int, OutputGroup] = {}
        self._group_of: dict[int, OutputGroup] = {}
        super().__init__(model, EngineConfig.from_kwargs(**config), keep_model=keep_model, spec=spec)

    def _build(self, spec: ModelSpec) -> None:
        super()._build(spec)
        pool_tokens = self.core.cache.num_pages * self.config.page_size
        self._prompts = PromptReader(self.tokenizer, self.model, spec, pool_tokens)
        device = self.core.executor.runner.device
        self._constraints = EngineConstraints(self.tokenizer, spec.vocab_size, self._prompts.eos_token_ids, device)

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
            ValueError: the prompt is empty, too long for the model or the pool, or holds an id outside the vocabulary; or the
                constraint is not supported. It is compiled while the engine goes on with others.
        """
        params = params or SamplingParams()
        text, token_ids = self._prompts.read(prompt, input_ids, params)
        fsm = self._constraints.compile(params, self._max_total(token_ids, params) - len(token_ids))
        return self._queue(text, token_ids, params, priority, (self.begin_request(), cache_salt), fsm)

    def _queue(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        priority: int,
        namespace: Hashable,
        fsm: Compiled | None,
    ) -> int:
        with self.core.lock:
            group: OutputGroup | None = None
            for index in range(params.n):
                request = self.core.add(
                    lambda rid, i=index: self._make(rid, token_ids, params, namespace, priority, i, fsm)
                )
                if group is None:
                    output = make_output(request.request_id, text, list(token_ids), params)
                    group = OutputGroup(output, params, self.tokenizer, skip_special_tokens=True)
                    self._groups[request.request_id] = group
                group.add(request)
                self._group_of[request.request_id] = group
            assert group is not None
            return group.output.request_id

    def _make(
        self,
        request_id: int,
        token_ids: list[int],
        params: SamplingParams,
        namespace: Hashable,
        priority: int,
        index: int,
        fsm: Compiled | None,
    ) -> Request:
        seed = params.seed + index if params.seed is not None else int(torch.randint(1 << 62, ()))
        most = self._max_total(token_ids, params)
        closes_at = most if params.close_within_budget else None
        constraint = None if fsm is None else self._constraints.open(fsm, len(token_ids), closes_at)
        return Request(
            request_id=request_id,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            params=params,
            namespace=namespace,
            max_total_tokens=most,
            eos_token_ids=frozenset() if params.ignore_eos and fsm is None else self._prompts.eos_token_ids,
            seed=seed,
            priority=priority,
            external_sampling=params.max_tokens == 0,
            logits_from=0 if params.prompt_logprobs is not None and index == 0 else None,
            **constraint_fields(constraint, may_jump=params.may_jump),
        )

    def _max_total(self, token_ids: list[int], params: SamplingParams) -> int:
        """Most tokens that a prompt and an output of it may have together."""
        limit = self.core.executor.runner.spec.max_positions
        return limit if params.max_tokens is None else min(limit, len(token_ids) + params.max_tokens)

    def open_constraint(
        self, fsm: Compiled, num_prompt_tokens: int, closes_at: int | None, vocabulary: Vocabulary
    ) -> RowConstraint | DynamicConstraint:
        """A row's constraint for `open_row`, compiled elsewhere for a vocabulary not wider than the logits."""
        with self.core.lock:
            return self._constraints.open(fsm, num_prompt_tokens, closes_at, vocabulary)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
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
            raise ValueError(
                f"got {len(batch)} prompts but {len(each)} SamplingParams: give one, or one for each prompt"
            )
        each = [one or SamplingParams() for one in each]
        read = [self._prompts.read(prompt, None, one) for prompt, one in zip(batch, each, strict=True)]
        budgets = [self._max_total(ids, one) - len(ids) for (_, ids), one in zip(read, each, strict=True)]
        compiled = self._constraints.compile_all(each, budgets)  # what is refused is refused before anything is queued
        namespace = (self.begin_request(), None)
        ids: list[int] = []
        disable = (len(batch) <= 8 or None) if use_tqdm is None else not use_tqdm  # None: only on a terminal
        try:
            with tqdm(total=len(batch), disable=disable, desc="generate", unit="prompt") as bar, self.core.driving():
                for (text, token_ids), one, fsm in zip(read, each, compiled, strict=True):
                    ids.append(self._queue(text, token_ids, one, 0, namespace, fsm))
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
        """Run one step by hand; returns (and forgets) the requests that it finished.

        With `overlap` that is the step launched before this one, and this one may still run: until a call that waits
        (`result`, `generate`, a new request) the weights must stay as they are.
        """
        self.core.step()
        with self.core.lock:
            done = [i for i, g in self._groups.items() if g.output.finished]
            outputs = [self._groups[i].output for i in done]
            for i in done:
                self._forget(i)
        return outputs

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a queued request is still going, or has ended (an abort, say) and was not handed over yet."""
        with self.core.lock:
            return bool(self._groups)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[StreamChunk]:
        """Complete one prompt and yield its tokens and text as they come. Leaving the loop aborts the request."""
        yield from self.stream_request(self.add_request(prompt, params, **options))

    def stream_request(self, request_id: int) -> Iterator[StreamChunk]:
        """The chunks of a request that `add_request` queued."""
        group = self._group(request_id)
        news: list[StreamChunk] = []
        finished = False

        def arrived() -> bool:
            nonlocal finished
            news.extend(group.chunks())
            finished = group.output.finished  # of the same moment as the chunks: another thread may be driving
            return bool(news) or finished

        try:
            while not finished:
                self.core.drive(arrived)
                batch, news[:] = list(news), []
                yield from batch
            if group.output.error is not None:
                raise group.output.error
        finally:
            self._forget(request_id)

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[StreamChunk]:
        """`stream` for asyncio: steps run in a worker thread, the event loop stays free."""
        return iterate_in_thread(lambda: self.stream(prompt, params, **options))

    def abort(self, request_id: int) -> None:
        """Stop a request; its output ends with finish_reason "abort". Unknown or ended ones are ignored."""
        with self.core.lock:
            group = self._groups.get(request_id)
            for request in group.requests if group else ():
                self.core.finish(request, RequestStatus.ABORTED, "abort")
                group.seal(request)

    def score(
        self, prefix: Prompt, continuations: Sequence[Prompt], *, cache_salt: Hashable = None
    ) -> list[ContinuationScore]:
        """Log-probabilities of fixed continuations of one prefix, which is computed once and cached.

        Args:
            prefix: text or token ids.
            continuations: texts (tokenized without special tokens) or token ids, not empty.
            cache_salt: as in `add_request`.

        Returns:
            One ContinuationScore for each, in order.
        """
        return scoring.score(self, self._prompts, prefix, continuations, cache_salt)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _fail_all(self, error: RuntimeError) -> None:
        super()._fail_all(error)
        for group in self._groups.values():
            for request in group.requests:
                group.seal(request)

    def _on_step(self, request: Request, result: StepResult) -> None:
        if isinstance(request.error, InvalidLogits):
            self.forget_spoilt()
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
