"""What an engine returns: plain records, and the assembly of a request's tokens into text. Knows no scheduler."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Logprob:
    """Log-probabilities at one position, of the model's own distribution (before temperature and filters).

    Attributes:
        logprob: of the token that stands there.
        top: token id -> log-probability of the likeliest tokens, as many as were asked for.
    """

    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the n.
        token_ids: generated ids, eos included where it ended the text.
        text: decoded text without special tokens, cut before a stop string; "" without a tokenizer.
        finish_reason: "stop", "length", "abort" or "error"; None while running.
        stop_reason: the stop string or token id that ended it, if one did.
        logprobs: one for each token, if asked for.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[Logprob] | None = None


@dataclass
class RequestOutput:
    """All completions of one prompt.

    Attributes:
        request_id: as returned by `add_request`.
        prompt: the text, if text was given.
        prompt_token_ids: its ids.
        outputs: the n completions.
        prompt_logprobs: one for each prompt token (the first is None), if asked for.
        num_cached_tokens: prompt tokens served by the prefix cache.
        error: why the request failed, if it did.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Logprob | None] | None = None
    num_cached_tokens: int = 0
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(o.finish_reason is not None for o in self.outputs)

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text


@dataclass(frozen=True)
class StreamChunk:
    """News of one completion: the tokens and the text that came since the last chunk.

    Attributes:
        request_id: whose.
        index: which completion.
        token_ids: new ids.
        text: new text; may be empty while characters or stop strings are undecided.
        finish_reason: set on the last chunk.
    """

    request_id: int
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class ContinuationScore:
    """How likely a model finds a fixed continuation.

    Attributes:
        logprobs: of each continuation token.
        total: their sum.
        is_greedy: whether each token is the likeliest at its place.
        num_cached_tokens: tokens that the prefix cache served.
    """

    logprobs: list[float]
    total: float
    is_greedy: bool
    num_cached_tokens: int


@dataclass(frozen=True)
class EngineStats:
    """Counters of an engine since its start, and its present load.

    Attributes:
        num_running, num_waiting: requests at this moment.
        num_pages_total, num_pages_free, num_pages_cached: pages of the pool; cached ones can be evicted.
        num_prompt_tokens: prompt tokens of all admitted requests.
        num_cached_tokens: those of them that the prefix cache served.
        num_generated_tokens: tokens produced.
        num_steps, num_retractions: scheduler steps, and requests sent back for want of pages.
        num_fallbacks: `generate` calls sent to the original code.
        fallback_reasons: reason -> how many of them.
        cache_hit_rate: num_cached_tokens / num_prompt_tokens, 0 if there were none.
        tokens_per_second: generated tokens per second of stepping.
        device_idle_share: of the time from the first to the last step of busy periods, the share between two steps, in
            which the device had nothing to run (since the engine, or the model's device or dtype, was last set up).
        num_cuda_graphs: graphs held now, one for each batch size that needed one.
        num_graph_replays: decode steps replayed from a graph.
        cuda_graph_bytes: device bytes of the graphs, their inputs and their result.
    """

    num_running: int
    num_waiting: int
    num_pages_total: int
    num_pages_free: int
    num_pages_cached: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_steps: int
    num_retractions: int
    num_fallbacks: int
    fallback_reasons: dict[str, int]
    cache_hit_rate: float
    tokens_per_second: float
    device_idle_share: float
    num_cuda_graphs: int = 0
    num_graph_replays: int = 0
    cuda_graph_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dictionary."""
        return dataclasses.asdict(self)
