"""Reads what a user may give as a prompt, and refuses what cannot run, with the remedy. Knows no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_accel.patching.registry import ModelSpec
from hf_accel.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Sequence[dict[str, Any]] | torch.Tensor
"""Text, token ids, or a chat."""


class PromptReader:
    """Turns prompts into token ids for one model and tokenizer.

    Args:
        tokenizer: or None, when only token ids are given.
        model: for its eos ids.
        spec: vocabulary size and longest position.
        pool_tokens: tokens that the whole KV pool holds.
    """

    def __init__(self, tokenizer: Any, model: PreTrainedModel, spec: ModelSpec, pool_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = spec.vocab_size
        self._max_positions = spec.max_positions
        self._pool_tokens = pool_tokens
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos = model.config.eos_token_id if eos is None else eos
        self.eos_token_ids = frozenset([eos] if isinstance(eos, int) else eos or ())

    def as_list(self, prompts: Any) -> list[Prompt]:
        """A batch of prompts, where one prompt alone may be given too."""
        if isinstance(prompts, str) or (isinstance(prompts, torch.Tensor) and prompts.dim() == 1):
            return [prompts]
        if isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], (int, dict)):
            return [prompts]
        return list(prompts)

    def read(
        self, prompt: Prompt | None, input_ids: Sequence[int] | torch.Tensor | None, params: SamplingParams
    ) -> tuple[str | None, list[int]]:
        """The prompt's text, if it was text, and its token ids.

        Raises:
            ValueError: nothing or too much given, empty, out of the vocabulary, too long, or a tokenizer is missing.
        """
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either a prompt or input_ids")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: Engine(model, tokenizer)")
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.encode(prompt if input_ids is None else input_ids)
        self._check(token_ids)
        return text, token_ids

    def encode(self, prompt: Any, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text, of a chat (with the tokenizer's template) or of ids."""
        if isinstance(prompt, torch.Tensor):
            return [int(t) for t in prompt.reshape(-1).tolist()]
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
        if (isinstance(prompt, str) or is_chat) and self.tokenizer is None:
            raise ValueError("text prompts need a tokenizer: Engine(model, tokenizer), or give input_ids")
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
        if is_chat:
            return list(
                self.tokenizer.apply_chat_template(
                    list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            )
        return [int(t) for t in prompt]

    def _check(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token (for instance the bos token)")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            bad = next(t for t in token_ids if not 0 <= t < self._vocab_size)
            raise ValueError(
                f"token id {bad} is outside the vocabulary [0, {self._vocab_size}): is the tokenizer this model's?"
            )
        if len(token_ids) > self._max_positions:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, the model takes at most {self._max_positions}: shorten it"
            )
        if len(token_ids) > self._pool_tokens:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, the KV pool holds {self._pool_tokens}: raise num_pages or memory_fraction, or shorten it"
            )
