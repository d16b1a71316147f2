"""Runs a window of tokenised prompts as few `generate` calls and hands each prompt what it would have got alone.

Knows the pipeline's `forward` and nothing of the engine behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import StopStringCriteria

from hf_accel.pipeline.grouping import grouping_of, make_groups

Inputs = dict[str, Any]
"""What HF's `preprocess` makes of one prompt: `input_ids` and `attention_mask` `[1, num_tokens]`, `prompt_text`."""


def run_window(
    forward: Callable[..., dict[str, Any]],
    window: Sequence[Inputs],
    params: Mapping[str, Any],
    forward_params: Callable[[Sequence[int]], Mapping[str, Any]],
    on_group: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Model outputs of the prompts in `window`, in order, each as HF's `forward` returns it for that prompt alone.

    Args:
        forward: the pipeline's `forward(inputs, **forward_params)`.
        params: the generation parameters in force, from whatever source (they decide what may share a call).
        forward_params: what is passed to `forward` with some prompts, by their indices in `window`.
        on_group: told how many prompts each finished call served.
    """
    results: list[dict[str, Any] | None] = [None] * len(window)
    lengths = [inputs["input_ids"].shape[-1] for inputs in window]
    for group in make_groups(lengths, grouping_of(params)):
        if len(group) == 1:
            results[group[0]] = forward(window[group[0]], **forward_params(group))
        else:
            members = [window[i] for i in group]
            outputs = forward(left_padded(members, params.get("pad_token_id")), **forward_params(group))
            for index, output in zip(group, split(outputs, members, params), strict=True):
                results[index] = output
        on_group(len(group))
    return [result for result in results if result is not None]


def left_padded(members: Sequence[Inputs], pad_id: int | None) -> Inputs:
    """One batch of the prompts. The mask is explicit, so that any id can stand for padding."""
    longest = max(inputs["input_ids"].shape[-1] for inputs in members)
    ids = torch.full((len(members), longest), 0 if pad_id is None else int(pad_id), dtype=torch.long)
    mask = torch.zeros((len(members), longest), dtype=torch.long)
    for row, inputs in enumerate(members):
        length = inputs["input_ids"].shape[-1]
        ids[row, longest - length :] = inputs["input_ids"][0]
        own_mask = inputs.get("attention_mask")
        mask[row, longest - length :] = 1 if own_mask is None else own_mask[0]
    return {"input_ids": ids, "attention_mask": mask, "prompt_text": [inputs["prompt_text"] for inputs in members]}


def split(outputs: Mapping[str, Any], members: Sequence[Inputs], params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a batch's output into one for each prompt: no padding before the prompt, none after its longest sequence."""
    sequences = outputs["generated_sequence"]  # [num_prompts, num_sequences, longest prompt + new tokens]
    longest = max(inputs["input_ids"].shape[-1] for inputs in members)
    ends = EndFinder(params)
    results = []
    for row, inputs in enumerate(members):
        length = inputs["input_ids"].shape[-1]
        own = sequences[row : row + 1, :, longest - length :]
        new = max(ends.num_new_tokens(ids, length) for ids in own[0].tolist())
        prompt_ids = inputs["input_ids"].cpu()
        results.append(
            {
                "generated_sequence": own[:, :, : length + new],
                "input_ids": prompt_ids,
                "prompt_text": inputs["prompt_text"],
            }
        )
    return results


class EndFinder:
    """Tells where a sequence of a batch ended: HF fills the rest of its row with the padding token, which may be eos."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        eos = params.get("eos_token_id")
        self._eos = set() if eos is None else {int(t) for t in (eos if isinstance(eos, (list, tuple)) else [eos])}
        pad = params.get("pad_token_id")
        first_eos = next(iter(eos)) if isinstance(eos, (list, tuple)) and eos else eos
        self._pad = first_eos if pad is None else int(pad)
        stops = params.get("stop_strings")
        self._stop = StopStringCriteria(params["tokenizer"], stops) if stops else None

    def num_new_tokens(self, ids: Sequence[int], num_prompt_tokens: int) -> int:
        """Tokens generated after the prompt, a final eos included.

        Args:
            ids: the prompt, what was generated, then padding.
        """
        new = ids[num_prompt_tokens:]
        end = next((i + 1 for i, token in enumerate(new) if token in self._eos), len(new))
        if self._stop is None:
            return end
        start = len(new)
        while start and new[start - 1] == self._pad:
            start -= 1
        if 0 < start < end and bool(self._stop(torch.tensor([ids[: num_prompt_tokens + start]]), None).all()):
            return start  # a stop string ended it, so that even an eos after it is padding
        return end
