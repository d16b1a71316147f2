"""What one request asks of the sampler. Plain data; knows neither torch nor transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LogitsProcessor = Callable[[list[int], Any], Any]
"""`(token_ids of prompt and output so far, logits [vocab_size] float32) -> logits [vocab_size]`."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. Defaults sample from the model's own distribution.

    Attributes:
        n: number of independent completions of the prompt.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
        repetition_penalty: as HF's, over prompt and output; 1 is off.
        presence_penalty, frequency_penalty: as OpenAI's, over the output; 0 is off.
        max_tokens: most tokens to generate; None: up to the model's longest position.
        min_tokens: eos and stop tokens are not allowed before so many tokens; a constraint that allows nothing else wins.
        stop: strings that end the text; they are cut from it. Needs a tokenizer.
        stop_token_ids: token ids that end the request, besides eos.
        ignore_eos: go on after eos.
        seed: makes the request's sampling reproducible whatever else runs beside it; None draws one.
        logprobs: report the log-probability of each generated token and of so many likeliest ones (0: only its own).
        prompt_logprobs: the same for prompt tokens; their positions are computed, not taken from the prefix cache.
        logit_bias: token id -> value added to its logit.
        logits_processors: callables `(token_ids, logits) -> logits` that see the whole history; applied first.
        regex: the output is a text that `re.fullmatch(regex, text)` matches. Needs a tokenizer, as do the next five, of
            which only one may be given. Eos is allowed where the text is complete, also with `ignore_eos`.
        json_schema: the output is JSON that a schema allows: a dict, JSON text, pydantic model, dataclass, TypedDict or type.
        choice: the output is one of these texts.
        json_object: the output is any JSON object.
        grammar: the output is a text of this grammar (Lark's notation, or GBNF). Needs the extra `grammar`.
        constraint: what says by itself what it is: an output type of outlines, a `Constraint`, a schema or a type.
        jump_forward: guess the text that a constraint forces, and verify the guesses in one step: fewer steps, the same answers.
        close_within_budget: the constraint is satisfied within `max_tokens`, eos included: near the end only tokens are
            allowed after which the shortest rest fits. Refused where not even the shortest output does. Without it an
            output that is cut off is known by its finish_reason "length".

    Raises:
        ValueError: for a value out of range, with the allowed range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = 128
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    regex: str | None = None
    json_schema: Any = None
    choice: Sequence[str] | None = None
    json_object: bool = False
    grammar: str | None = None
    constraint: Any = None
    jump_forward: bool = True
    close_within_budget: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        _check(self.n >= 1, "n", self.n, "at least 1")
        _check(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 (greedy) or more",
        )
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        _check(math.isfinite(self.presence_penalty), "presence_penalty", self.presence_penalty, "finite")
        _check(math.isfinite(self.frequency_penalty), "frequency_penalty", self.frequency_penalty, "finite")
        _check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more, or None")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        if self.max_tokens is not None:
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"at most max_tokens={self.max_tokens}",
            )
        _check(all(self.stop), "stop", self.stop, "non-empty strings")
        if self.num_constraints > 1:
            raise ValueError("give only one of regex, json_schema, choice, grammar, json_object and constraint")
        if self.close_within_budget and not self.constrained:
            raise ValueError("close_within_budget needs a constraint: regex, json_schema, choice or json_object")
        _check(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "0 or more, or None")
        _check(
            self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "prompt_logprobs",
            self.prompt_logprobs,
            "0 or more, or None",
        )

    @functools.cached_property
    def constrained(self) -> bool:
        """Whether the output must satisfy a constraint."""
        return self.num_constraints > 0

    @property
    def num_constraints(self) -> int:
        """How many of `regex`, `json_schema`, `choice`, `grammar`, `json_object` and `constraint` are given."""
        given = (self.regex, self.json_schema, self.choice, self.grammar, self.constraint)
        return sum(v is not None for v in given) + bool(self.json_object)

    @functools.cached_property
    def may_jump(self) -> bool:
        """Whether tokens may be guessed: a constrained row's, whose own tokens change its logits in no other way."""
        penalised = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return self.jump_forward and self.constrained and not penalised and not self.logits_processors

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < 1e-6 or self.top_k == 1

    @functools.cached_property
    def plain_greedy(self) -> bool:
        """Whether the token is the argmax of the raw logits and nothing but its id is asked for."""
        return (
            self.greedy
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and self.min_tokens == 0
            and not self.constrained
            and self.logprobs is None
            and not self.logit_bias
            and not self.logits_processors
        )


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
