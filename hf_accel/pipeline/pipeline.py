"""`AcceleratedPipeline`: transformers' text-generation pipeline, whose lists run as one continuously batched set.

Owns how inputs are cut into windows and how progress is shown. Preprocessing, the call of `generate` and postprocessing
stay HF's own methods.
"""

from __future__ import annotations

import collections.abc
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, TextGenerationPipeline

import hf_accel
from hf_accel.engine import progress as row_progress
from hf_accel.engine.generate_keywords import CONSTRAINTS, num_prompts, of_prompts
from hf_accel.pipeline import streaming
from hf_accel.pipeline.batching import run_window
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor

LONG_LIST = 8
"""Lists of more prompts than this show a progress bar on a terminal."""


class AcceleratedPipeline(TextGenerationPipeline):
    """A `TextGenerationPipeline` on a patched model: same inputs, same outputs, lists and datasets run batched.

    Greedy answers are those of HF's pipeline. Sampled ones are drawn from the same distributions; for HF's own draws under a
    seed, prompt after prompt, pass `batch_size=1`.

    Args:
        model: a loaded model (patched in place, unless it is already and `engine_config` is None), a hub id, or a folder.
        tokenizer: a tokenizer, its id or folder; None: the one saved with the model.
        engine_config: fields of `hf_accel.EngineConfig`, as a dict.
        progress: show a progress bar for lists: True, False, or None (for more than 8 prompts, on a terminal).
        kwargs: as for `transformers.pipeline("text-generation", ...)`. `batch_size` is how many prompts are handed to the
            engine at once; the default is as many as it runs at once. It never changes an answer.

    Raises:
        UnsupportedModelError: the model cannot be accelerated; the message says why.
        ValueError: an engine option is unknown or out of range, or there is no tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: Any = None,
        *args: Any,
        engine_config: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self._progress = progress
        kwargs.setdefault("task", "text-generation")
        if isinstance(model, (str, Path)) or isinstance(tokenizer, str):
            kwargs = _load_parts(model, tokenizer, kwargs)
            model, tokenizer = kwargs.pop("model"), kwargs.pop("tokenizer", None)
        elif tokenizer is None:
            tokenizer = _tokenizer_of(model)
        super().__init__(model, tokenizer, *args, **kwargs)
        if engine_config is not None or not hf_accel.is_patched(self.model):
            hf_accel.patch(self.model, **dict(engine_config or {}))

    def __call__(self, text_inputs: Any, *, stream: bool = False, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Complete the prompts.

        Args:
            text_inputs: a string, a chat (list of role/content dicts), a list of either, or a generator or dataset of either.
            stream: return an iterator over pieces of new text as they are generated: strings for one prompt, pairs
                `(index of the prompt, piece)` for a list. The pieces of a prompt join to its new text.
            batch_size: prompts handed to the engine at once; for a generator, also how many are read ahead (1 for a source
                that waits for the previous answer).
            kwargs: as for HF's pipeline; also `progress=True` or `False`, and `regex=`, `json_schema=`, `choice=`, `grammar=`,
                `json_object=True` or `constraint=` (see `SamplingParams`), or a list with one, or None, for each prompt.

        Returns:
            What HF's pipeline returns: a list of dicts for one prompt, a list of those for a list, an iterator over them for
            a generator or dataset.
        """
        if stream:
            return self._stream(text_inputs, kwargs)
        batch_size = batch_size or self._batch_size or self._window(kwargs)
        return super().__call__(text_inputs, batch_size=batch_size, **kwargs)

    def _sanitize_parameters(self, progress: bool | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if progress is not None:
            forward["progress"] = progress
        if any(name in forward for name in CONSTRAINTS):
            forward["tokenizer"] = self.tokenizer
        return preprocess, forward, postprocess

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Any:
        """HF's own path for one prompt."""
        forward_params = {k: v for k, v in forward_params.items() if k != "progress"}
        return super().run_single(inputs, preprocess_params, forward_params, postprocess_params)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Any:
        """Outputs of many inputs, in order; `batch_size` of them are prepared and generated at once."""
        forward_params = dict(forward_params)
        show = forward_params.pop("progress", self._progress)
        num_lists = num_prompts(forward_params)
        if batch_size == 1 and not show and num_lists is None:
            return super().get_iterator(inputs, 0, 1, preprocess_params, forward_params, postprocess_params)
        length = len(inputs) if isinstance(inputs, collections.abc.Sized) else None
        if num_lists is not None and length not in (None, num_lists):
            raise ValueError(f"got a list of {num_lists} constraints for {length} prompts: give one (or None) for each")
        params = self._generation_params(forward_params)
        if all(_acts_by_row(p) for p in params.get("logits_processor") or ()):
            params.pop("logits_processor", None)  # it keeps no prompts apart

        def run() -> Iterator[Any]:
            source = iter(inputs) if hasattr(inputs, "__iter__") else (inputs[i] for i in range(length or 0))
            is_list = isinstance(inputs, list)
            starts = itertools.count(0, batch_size)
            with _Bar(show, length, is_list, params.get("num_return_sequences") or 1) as bar:
                while window := list(itertools.islice(source, batch_size)):
                    own = functools.partial(of_prompts, forward_params, first=next(starts))
                    prepared = [self.preprocess(item, **preprocess_params) for item in window]
                    with row_progress.track(bar.rows_finished) if bar.shown else nullcontext():
                        outputs = run_window(self.forward, prepared, params, own, bar.group_finished)
                    yield from (self.postprocess(output, **postprocess_params) for output in outputs)

        return _SizedIterator(run, length)

    def _window(self, kwargs: Mapping[str, Any]) -> int:
        """How many prompts the engine runs at once."""
        if not hf_accel.is_patched(self.model):
            return 1
        sequences = self._generation_params({**self._forward_params, **kwargs}).get("num_return_sequences") or 1
        return max(1, hf_accel.get_engine(self.model).config.max_num_seqs // max(1, int(sequences)))

    def _generation_params(self, forward_params: Mapping[str, Any]) -> dict[str, Any]:
        """Generation parameters in force for a call, from the model, the pipeline and the call, whoever set them."""
        params = self.model.generation_config.to_diff_dict()
        own_config = getattr(self, "generation_config", None)  # older transformers: the pipeline's own copy
        params.update(own_config.to_diff_dict() if own_config is not None else {})
        if "generation_config" not in forward_params:
            forward_params = {**getattr(self, "_generate_kwargs", {}), **forward_params}
        config = forward_params.get("generation_config")
        params.update(config.to_diff_dict() if config is not None else {})
        params.update(forward_params)
        if forward_params.get("max_length") is not None and forward_params.get("max_new_tokens") is None:
            params["max_new_tokens"] = None  # whichever of the two HF lets decide, grouping by length is right
        elif params.get("max_length") is None:
            params.setdefault("max_new_tokens", getattr(self, "_generation_defaults", {}).get("max_new_tokens"))
        if params.get("pad_token_id") is None:
            params["pad_token_id"] = self.tokenizer.pad_token_id
        return params

    def _stream(self, text_inputs: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
        own = [dict(p) for p in (self._preprocess_params, self._forward_params, self._postprocess_params)]
        for params, given in zip(own, self._sanitize_parameters(**kwargs), strict=True):
            params.update(given)
        preprocess_params, forward_params, postprocess_params = own
        forward_params.pop("progress", None)
        if (self._generation_params(forward_params).get("num_return_sequences") or 1) > 1:
            raise ValueError("stream=True gives one text for each prompt: leave num_return_sequences out")
        decoding = {
            "skip_special_tokens": postprocess_params.get("skip_special_tokens", True),
            "clean_up_tokenization_spaces": postprocess_params.get("clean_up_tokenization_spaces"),
        }

        def generate(numbered: tuple[int, Any], streamer: Any) -> None:
            own = of_prompts(forward_params, [numbered[0]])
            self.forward(self.preprocess(numbered[1], **preprocess_params), streamer=streamer, **own)

        items, is_single = streaming.as_items(text_inputs)
        if (num_lists := num_prompts(forward_params)) not in (None, len(items)):
            raise ValueError(
                f"got a list of {num_lists} constraints for {len(items)} prompts: give one (or None) for each"
            )
        pieces = streaming.stream(
            generate, list(enumerate(items)), self.tokenizer, decoding, max_threads=self._window(kwargs)
        )
        return (piece for _, piece in pieces) if is_single else pieces


def _acts_by_row(processor: Any) -> bool:
    """Whether a logits processor does to each row what it would do to it alone."""
    return isinstance(processor, ConstraintLogitsProcessor) and processor.is_for_any_row


class _SizedIterator:
    """An iterator over outputs that knows its length where the input does; iterating again starts over."""

    def __init__(self, make: Callable[[], Iterator[Any]], length: int | None) -> None:
        self._make, self._length = make, length
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> _SizedIterator:
        self._iterator = self._make()
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._make()
        return next(self._iterator)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the input has no length")
        return self._length


class _Bar:
    """A bar over prompts. Rows of a running call move it early; the call's end sets it right, whatever was reported."""

    def __init__(self, show: bool | None, total: int | None, is_list: bool, rows_per_prompt: int) -> None:
        wanted = show if show is not None else is_list and (total or 0) > LONG_LIST
        disable = not wanted if show is not None or not wanted else None  # None: only on a terminal
        self._bar = tqdm(total=total, unit="prompt", disable=disable)
        self.shown = not self._bar.disable
        self._rows_per_prompt = rows_per_prompt
        self._done = self._rows = 0

    def rows_finished(self, num_rows: int) -> None:
        self._rows += num_rows
        self._move_to(self._done + self._rows // self._rows_per_prompt)

    def group_finished(self, num_prompts: int) -> None:
        self._done, self._rows = self._done + num_prompts, 0
        self._move_to(self._done)

    def _move_to(self, count: int) -> None:
        self._bar.update(count - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class _Parts:
    """Stands in for the pipeline class while `transformers.pipeline` loads its parts, and keeps them."""

    _load_processor = TextGenerationPipeline._load_processor
    _load_image_processor = TextGenerationPipeline._load_image_processor
    _load_video_processor = getattr(TextGenerationPipeline, "_load_video_processor", None)
    _load_feature_extractor = TextGenerationPipeline._load_feature_extractor
    _load_tokenizer = TextGenerationPipeline._load_tokenizer

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs


def _load_parts(model: Any, tokenizer: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `transformers.pipeline` would construct its pipeline with."""
    task = kwargs["task"]
    options = {k: v for k, v in kwargs.items() if k != "task"}
    parts: Any = transformers.pipeline(task, model=model, tokenizer=tokenizer, pipeline_class=_Parts, **options)
    return parts.kwargs


def _tokenizer_of(model: PreTrainedModel) -> Any:
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ValueError("the model does not say where it was loaded from: pass its tokenizer as tokenizer=...")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer was found in {name!r}: pass one as tokenizer=...") from error
