"""What became of a sampled batch: tensors on the device first, one record for each row when the host asks.

Owns which row's failure is whose, and log-probabilities. Does not know how a token is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_accel.engine.upload import download, upload


@dataclass
class SampledToken:
    """What became of one row.

    Attributes:
        token_id: the token, or -1 with an error.
        logprob: its log-probability in the model's own distribution: before temperature, penalties and every other
            parameter. None unless `params.logprobs` asks for it.
        top_logprobs: the so many likeliest tokens of that distribution, likeliest first. None unless asked for.
        error: why there is no token; the row's alone.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    error: Exception | None = None


class InvalidLogits(ValueError):
    """The model's own logits of a row are NaN or infinite."""


@dataclass
class TokenLogprobs:
    """Log-probabilities in the model's own distribution, of some rows' tokens and of the likeliest ones.

    Attributes:
        own: [num_rows] float32.
        top_values: [num_rows, top_n] float32, highest first; None if none are wanted.
        top_ids: [num_rows, top_n] int64, likewise.
    """

    own: Tensor
    top_values: Tensor | None = None
    top_ids: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, top_n: int) -> TokenLogprobs:
        """Of `token_ids` [num_rows] int64 in `logits` [num_rows, vocab_size] float32. Waits for nothing."""
        log_total = logits.logsumexp(dim=-1, keepdim=True)
        own = (logits.gather(1, token_ids[:, None]) - log_total)[:, 0]
        if top_n <= 0:
            return cls(own)
        values, ids = logits.topk(min(top_n, logits.shape[1]), dim=-1)
        return cls(own, values - log_total, ids)

    def to_host(self) -> TokenLogprobs:
        """See `SampledBatch.to_host`."""
        if self.top_values is None or self.top_ids is None:
            return TokenLogprobs(download(self.own))
        return TokenLogprobs(download(self.own), download(self.top_values), download(self.top_ids))

    def tolist(self) -> list[tuple[float, dict[int, float]]]:
        """For each row its log-probability, and those of the likeliest tokens."""
        own = self.own.tolist()
        if self.top_values is None or self.top_ids is None:
            return [(logprob, {}) for logprob in own]
        top = zip(self.top_ids.tolist(), self.top_values.tolist(), strict=True)
        return [(logprob, dict(zip(*pair, strict=True))) for logprob, pair in zip(own, top, strict=True)]


@dataclass
class SampledBatch:
    """The choices of a batch. Everything lies on the logits' device until `to_host` or `finish`.

    Attributes:
        token_ids: [num_rows] int64; some id of the vocabulary in rows without a valid choice, too.
        valid: [num_rows] bool, or int64 that is 0 or 1.
        logits: [num_rows, vocab_size], the model's own; or
        peak: [num_rows], the highest of each row: NaN if one is.
        errors: row -> its own processor's or parameter's failure.
        wanted: row -> how many of the likeliest tokens to report.
        logprobs: of the rows in `wanted`, in its order.
    """

    token_ids: Tensor
    valid: Tensor
    logits: Tensor | None
    peak: Tensor | None = None
    errors: dict[int, Exception] = field(default_factory=dict)
    wanted: dict[int, int] = field(default_factory=dict)
    logprobs: TokenLogprobs | None = None

    def to_host(self) -> SampledBatch:
        """The same on the host, whole when what is queued on the device now is done; it holds no logits any more."""
        assert self.logits is not None
        return SampledBatch(
            download(self.token_ids),
            download(self.valid),
            None,
            download(self.logits.amax(dim=-1)) if len(self.token_ids) else self.logits.new_empty(0).cpu(),
            self.errors,
            self.wanted,
            self.logprobs and self.logprobs.to_host(),
        )

    def finish(self) -> list[SampledToken]:
        """One record for each row. Waits for the device if the tensors are there."""
        results = [
            SampledToken(token_id) if valid and i not in self.errors else SampledToken(-1, error=self._error(i))
            for i, (token_id, valid) in enumerate(zip(self.token_ids.tolist(), self.valid.tolist(), strict=True))
        ]
        if self.logprobs is None:
            return results
        for (i, top_n), (logprob, top) in zip(self.wanted.items(), self.logprobs.tolist(), strict=True):
            if results[i].error is None:
                results[i].logprob = logprob
                results[i].top_logprobs = dict(list(top.items())[:top_n])
        return results

    def _error(self, row: int) -> Exception:
        if row in self.errors:
            return self.errors[row]
        if self.peak is not None:
            return why_invalid(float(self.peak[row]))
        assert self.logits is not None
        return why_invalid(float(self.logits[row].amax()))


def why_invalid(peak: float) -> ValueError:
    """Why nothing could be chosen from logits of which `peak` is the highest (NaN if one of them is)."""
    if math.isnan(peak):
        return InvalidLogits(
            "the model produced NaN logits for this request: look for NaN in its weights, or run it in a wider dtype"
        )
    if math.isinf(peak):
        return InvalidLogits("the model produced infinite logits for this request: run it in a wider dtype")
    return ValueError(
        "no token can be sampled: after logits_processors, logit_bias, penalties and min_tokens every logit is -inf or "
        "NaN; let at least one token through"
    )


def logprobs_of(logits: Tensor, token_ids: Sequence[int], top_n: int) -> list[tuple[float, dict[int, float]]]:
    """Log-probabilities of given tokens in the model's own distribution, and of the `top_n` likeliest ones.

    Args:
        logits: [num_rows, vocab_size] float32.
        token_ids: one for each row.
        top_n: how many of the likeliest to report, likeliest first; 0: none.
    """
    if not token_ids:
        return []
    return TokenLogprobs.of(logits, upload(list(token_ids), torch.long, logits.device), top_n).tolist()
