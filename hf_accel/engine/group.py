"""The n requests of one prompt and the RequestOutput they fill, token by token. Called under the engine's lock."""

from __future__ import annotations

from typing import Any

import torch

from hf_accel.engine.detokenizer import IncrementalDetokenizer
from hf_accel.engine.executor import StepResult
from hf_accel.engine.outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
from hf_accel.engine.sampled import SampledToken, logprobs_of
from hf_accel.request import Request
from hf_accel.sampling_params import SamplingParams


class OutputGroup:
    """Assembles what `requests` produce. The engine tells it of every step."""

    def __init__(
        self, output: RequestOutput, params: SamplingParams, tokenizer: Any, skip_special_tokens: bool
    ) -> None:
        self.output = output
        self.params = params
        self.requests: list[Request] = []
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._detokenizers: list[IncrementalDetokenizer | None] = []
        self._prompt_logprobs: dict[int, Logprob] = {}
        self._streamed: list[tuple[int, int, bool]] = []

    def add(self, request: Request) -> None:
        """Take in the next of the n requests."""
        self.requests.append(request)
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer,
                self.params.stop,
                skip_special_tokens=self._skip_special_tokens,
                prompt_token_ids=request.token_ids,
            )
        self._detokenizers.append(detokenizer)
        self._streamed.append((0, 0, False))

    def on_step(self, request: Request, result: StepResult) -> str | None:
        """Take in a step's tokens of one request, up to the one that completes a stop string; returns that, if any."""
        if request.request_id in result.prompt_logits:
            self._record_prompt(request, *result.prompt_logits[request.request_id])
        index = self.requests.index(request)
        stopped = None
        for token in result.tokens.get(request.request_id, ()):
            stopped = self._take(index, token)
            if stopped is not None:
                break
        return stopped

    def _take(self, index: int, token: SampledToken) -> str | None:
        completion = self.output.outputs[index]
        completion.token_ids.append(token.token_id)
        if completion.logprobs is not None and token.logprob is not None:
            completion.logprobs.append(Logprob(token.logprob, token.top_logprobs or {}))
        detokenizer = self._detokenizers[index]
        if detokenizer is None:
            return None
        detokenizer.push(token.token_id)
        completion.text = detokenizer.text
        return detokenizer.finished_by

    def seal(self, request: Request) -> None:
        """Record how a request ended."""
        index = self.requests.index(request)
        completion = self.output.outputs[index]
        if completion.finish_reason is not None:
            return
        detokenizer = self._detokenizers[index]
        if detokenizer is not None:
            detokenizer.flush()
            completion.text = detokenizer.text
            completion.stop_reason = detokenizer.finished_by
        last = completion.token_ids[-1] if completion.token_ids else None
        if request.finish_reason == "stop" and completion.stop_reason is None and last in self.params.stop_token_ids:
            completion.stop_reason = last
        completion.finish_reason = request.finish_reason
        if completion.stop_reason is not None and request.finish_reason == "length":
            completion.finish_reason = (
                "stop"  # tokens after the stop string may have reached the limit in the same step
            )
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, request.num_cached_tokens or 0)
        self.output.error = self.output.error or request.error
        if self.params.prompt_logprobs is not None:
            ids = self.output.prompt_token_ids
            self.output.prompt_logprobs = [self._prompt_logprobs.get(i) for i in range(len(ids))]

    def chunks(self) -> list[StreamChunk]:
        """What is new since the last call, one chunk for each completion with news."""
        news = []
        for index, completion in enumerate(self.output.outputs):
            num_tokens, num_chars, closed = self._streamed[index]
            ended = completion.finish_reason is not None
            if closed or (len(completion.token_ids) == num_tokens and not ended):
                continue
            ids, text = completion.token_ids[num_tokens:], completion.text[num_chars:]
            news.append(StreamChunk(self.output.request_id, index, ids, text, completion.finish_reason))
            self._streamed[index] = (len(completion.token_ids), len(completion.text), ended)
        return news

    def _record_prompt(self, request: Request, first: int, logits: torch.Tensor) -> None:
        """`logits` [n, vocab_size] of positions first.. predict the tokens after them."""
        ids = request.token_ids[first + 1 : min(first + 1 + logits.shape[0], request.num_prompt_tokens)]
        if not ids:
            return
        top_n = self.params.prompt_logprobs or 0
        for offset, (logprob, top) in enumerate(logprobs_of(logits[: len(ids)], ids, top_n)):
            self._prompt_logprobs[first + 1 + offset] = Logprob(logprob, top or {})


def make_output(request_id: int, prompt: str | None, token_ids: list[int], params: SamplingParams) -> RequestOutput:
    """An empty output for a prompt, with its n completions."""
    outputs = [CompletionOutput(i, logprobs=[] if params.logprobs is not None else None) for i in range(params.n)]
    return RequestOutput(request_id, prompt, token_ids, outputs)
