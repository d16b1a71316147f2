"""Every argument of `generate()` that a drop-in must honour, as calls that can be made again and again.

A case is a function that makes fresh keyword arguments (processors and streamers may hold state). Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

Case = Callable[[], dict[str, Any]]

PAD = 0
EOS = list(range(7, 256, 16))
"""Many ids end a row, so that rows of random weights end at different steps."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens of two letters each: "aa", "ba", ...; text and ids determine each other."""
    vocab = {chr(97 + i % 16) + chr(97 + i // 16): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="aa"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="aa", bos_token="ba", eos_token="ca")


class RisingBias(LogitsProcessor):
    """Stateful: favours another token at each call."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        scores = scores.clone()
        scores[:, 3 + self.num_calls] += 2.0
        scores[0, int(input_ids[0, -1])] -= 5.0
        return scores


class EndsAfterToken(StoppingCriteria):
    """Ends a row when its last token is divisible by 5."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 5 == 0


class SeesScores(StoppingCriteria):
    """Ends every row at the third set of scores, which it gets only if they are returned."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), scores is not None and len(scores) == 3)


def greedy(**options: Any) -> Case:
    """A greedy call of at most 12 tokens."""
    return lambda: {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, **options}


def sampled(**options: Any) -> Case:
    """A sampling call of at most 10 tokens, from the whole vocabulary unless the options say otherwise."""
    return lambda: {"max_new_tokens": 10, "do_sample": True, "top_k": 0, "pad_token_id": PAD, **options}


def fresh(make: Callable[[], dict[str, Any]], base: Case | None = None) -> Case:
    """A case with objects that must be new for each call."""
    return lambda: {**(base or greedy())(), **make()}


LENGTHS: dict[str, Case] = {
    "nothing": lambda: {},
    "max_new_tokens": greedy(),
    "max_new_tokens_1": greedy(max_new_tokens=1),
    "max_length": lambda: {"max_length": 30, "do_sample": False, "pad_token_id": PAD},
    "max_length_one_more": lambda: {"max_length": 18, "do_sample": False, "pad_token_id": PAD},
    "both_max": greedy(max_length=20),
    "min_length": greedy(min_length=26, eos_token_id=EOS),
    "min_new_tokens": greedy(min_new_tokens=9, eos_token_id=EOS),
    "generation_config": lambda: {"generation_config": GenerationConfig(max_new_tokens=7, eos_token_id=EOS, pad_token_id=1)},
    "eos": greedy(eos_token_id=EOS),
    "eos_int": greedy(eos_token_id=151),
    "eos_tensor": greedy(eos_token_id=torch.tensor(EOS)),
    "pad_is_eos": greedy(eos_token_id=EOS, pad_token_id=EOS[0]),
    "pad_unset": lambda: {"max_new_tokens": 12, "eos_token_id": EOS},
    "max_time": greedy(max_time=0.0),
    "max_time_long": greedy(max_time=1000.0),
    "prefill_chunk_size": greedy(prefill_chunk_size=4),
    "cache_dynamic": greedy(cache_implementation="dynamic"),
    "disable_compile": greedy(disable_compile=True),
    "compile_config": fresh(lambda: {"compile_config": CompileConfig()}),
    "max_cache_len": greedy(max_cache_len=64),
    "past_the_models_positions": greedy(max_new_tokens=245),
    "no_mask_given": greedy(attention_mask=None),
    "logits_to_keep": greedy(logits_to_keep=1),
    "position_ids_as_hfs": fresh(lambda: {"position_ids": _hf_position_ids()}),
}  # fmt: skip

SAMPLING: dict[str, Case] = {
    "plain": sampled(),
    "defaults": lambda: {"do_sample": True, "max_new_tokens": 8, "pad_token_id": PAD},
    "temperature": sampled(temperature=0.6),
    "top_k": sampled(top_k=7),
    "top_p": sampled(top_p=0.8),
    "min_p": sampled(min_p=0.1),
    "top_h": sampled(top_h=0.5),
    "typical_p": sampled(typical_p=0.7),
    "epsilon_cutoff": sampled(epsilon_cutoff=0.004),
    "eta_cutoff": sampled(eta_cutoff=0.01),
    "all": sampled(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.2),
    "eos": sampled(eos_token_id=EOS),
    "num_return_sequences": sampled(num_return_sequences=3),
    "num_return_sequences_eos": sampled(num_return_sequences=2, eos_token_id=EOS),
    "renormalize_logits": sampled(renormalize_logits=True, top_k=9),
    "return_dict": sampled(return_dict_in_generate=True, output_scores=True, output_logits=True, eos_token_id=EOS, top_k=9),
}  # fmt: skip

PROCESSORS: dict[str, Case] = {
    "repetition_penalty": greedy(repetition_penalty=1.8),
    "encoder_repetition_penalty": greedy(encoder_repetition_penalty=1.5),
    "no_repeat_ngram_size": greedy(no_repeat_ngram_size=2, max_new_tokens=20),
    "encoder_no_repeat_ngram_size": greedy(encoder_no_repeat_ngram_size=1),
    "bad_words_ids": greedy(bad_words_ids=[[k] for k in range(20, 200, 3)] + [[21, 22], [40, 41]]),
    "sequence_bias": greedy(sequence_bias=[[[33], 9.0], [[33, 34], 9.0]]),
    "forced_bos_token_id": greedy(forced_bos_token_id=99),
    "forced_eos_token_id": greedy(forced_eos_token_id=98),
    "remove_invalid_values": greedy(remove_invalid_values=True),
    "exponential_decay": greedy(exponential_decay_length_penalty=(2, 1.6), eos_token_id=EOS),
    "suppress_tokens": greedy(suppress_tokens=list(range(10, 250, 2))),
    "begin_suppress_tokens": greedy(begin_suppress_tokens=list(range(10, 250))),
    "renormalize_logits": greedy(renormalize_logits=True, return_dict_in_generate=True, output_scores=True),
    "watermarking": greedy(watermarking_config=WatermarkingConfig(bias=3.0, seeding_scheme="lefthash")),
    "watermarking_selfhash": sampled(watermarking_config=WatermarkingConfig(bias=3.0, seeding_scheme="selfhash")),
    "synthid": fresh(
        lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[11, 23, 35, 47])}, sampled()
    ),
    "prefix_allowed_tokens_fn": greedy(
        prefix_allowed_tokens_fn=lambda batch_id, ids: [10 + batch_id, 20 + len(ids), 100, 101 + batch_id]
    ),
    "user_processor": fresh(lambda: {"logits_processor": [RisingBias()]}),
    "user_processor_list_sampled": fresh(
        lambda: {"logits_processor": LogitsProcessorList([RisingBias()]), "eos_token_id": EOS}, sampled(temperature=0.7)
    ),
    "user_criteria": fresh(lambda: {"stopping_criteria": [EndsAfterToken()]}),
    "user_criteria_with_eos": fresh(
        lambda: {"stopping_criteria": StoppingCriteriaList([EndsAfterToken()]), "eos_token_id": 151}
    ),
    "user_criteria_scores": fresh(
        lambda: {"stopping_criteria": [SeesScores()], "return_dict_in_generate": True, "output_scores": True}
    ),
    "user_criteria_no_scores": fresh(lambda: {"stopping_criteria": [SeesScores()]}),
    "stop_strings": fresh(lambda: {"stop_strings": ["ba", "efg", "h"], "tokenizer": make_tokenizer()}),
    "stop_string_sampled": fresh(lambda: {"stop_strings": "k", "tokenizer": make_tokenizer()}, sampled()),
    "token_healing": fresh(lambda: {"token_healing": True, "tokenizer": make_tokenizer()}),
    "several": greedy(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=5, eos_token_id=EOS),
}  # fmt: skip

OUTPUTS: dict[str, Case] = {
    "dict": greedy(return_dict_in_generate=True),
    "dict_eos": greedy(return_dict_in_generate=True, eos_token_id=EOS),
    "scores": greedy(return_dict_in_generate=True, output_scores=True, eos_token_id=EOS),
    "logits": greedy(return_dict_in_generate=True, output_logits=True, repetition_penalty=1.5),
    "scores_and_logits": greedy(return_dict_in_generate=True, output_scores=True, output_logits=True, min_new_tokens=4, eos_token_id=EOS),
    "scores_without_dict": greedy(output_scores=True, output_logits=True),
    "dict_logits_config": lambda: {
        "generation_config": GenerationConfig(
            max_new_tokens=5, return_dict_in_generate=True, output_logits=True, pad_token_id=PAD
        )
    },
}  # fmt: skip

FALLBACKS: dict[str, tuple[str, Case]] = {
    "use_cache": ("use_cache=False", greedy(use_cache=False)),
    "output_attentions": ("output_attentions", greedy(return_dict_in_generate=True, output_attentions=True)),
    "attentions_without_dict": ("model argument(s) output_attentions", greedy(output_attentions=True)),
    "output_hidden_states": ("output_hidden_states", greedy(return_dict_in_generate=True, output_hidden_states=True)),
    "guidance_scale": ("guidance_scale", greedy(guidance_scale=1.5)),
    "static_cache": ("cache_implementation='static'", greedy(cache_implementation="static")),
    "position_ids": ("position_ids given by the caller", fresh(lambda: {"position_ids": _hf_position_ids() + 3})),
    "inputs_embeds": ("model argument", fresh(lambda: {"inputs_embeds": _embeds()})),
    "negative_prompt": (
        "guidance_scale",
        fresh(lambda: {"guidance_scale": 1.3, "negative_prompt_ids": torch.full((3, 17), 9)}),
    ),
    "sliding_cache": ("cache_implementation='sliding_window'", greedy(cache_implementation="sliding_window")),
    "no_end_in_sight": (
        "does not fit in the KV pool",
        greedy(max_new_tokens=100_000, eos_token_id=list(range(3, 256, 2))),
    ),
    "user_cache": ("past_key_values given by the caller", fresh(lambda: {"past_key_values": DynamicCache()})),
    "user_cache_dict": (
        "past_key_values given by the caller",
        fresh(lambda: {"past_key_values": DynamicCache(), "return_dict_in_generate": True}),
    ),
}
"""Calls that arrive at `_sample` and go on to the original: the reason that must be counted, and the call."""

ELSEWHERE: dict[str, Case] = {
    "beams": greedy(num_beams=3),
    "beam_sample": sampled(num_beams=2),
    "beams_returned": greedy(num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True),
}
"""Calls that HF serves by other methods: they never arrive, and are not counted."""

ERRORS: dict[str, Case] = {
    "synced_gpus_without_a_group": greedy(synced_gpus=True),
    "four_dimensional_mask": fresh(lambda: {"attention_mask": torch.ones(3, 1, 17, 17, dtype=torch.bool).tril()}),
    "token_type_ids": fresh(lambda: {"token_type_ids": torch.zeros(3, 17, dtype=torch.long)}),
    "greedy_num_return_sequences": greedy(num_return_sequences=2),
    "unknown_argument": greedy(no_such_argument=1),
    "max_new_tokens_0": greedy(max_new_tokens=0),
    "max_length_below_prompt": lambda: {"max_length": 5, "pad_token_id": PAD},
    "negative_temperature": sampled(temperature=-1.0),
    "stop_strings_without_tokenizer": greedy(stop_strings="ab"),
    "contrastive": greedy(penalty_alpha=0.6, top_k=4),
    "bad_processor": fresh(lambda: {"logits_processor": [lambda ids, scores: 1 / 0]}),
    "bad_criteria": fresh(lambda: {"stopping_criteria": [lambda ids, scores: 1 / 0]}),
    "nan_while_sampling": fresh(lambda: {"logits_processor": [lambda ids, scores: scores * float("nan")]}, sampled()),
    "streamer_with_beams": fresh(lambda: {"streamer": object(), "num_beams": 2}),
    "wrong_mask_shape": fresh(lambda: {"attention_mask": torch.ones(3, 5, dtype=torch.long)}),
    "quantized_cache": greedy(cache_implementation="quantized"),
    "unknown_cache": greedy(cache_implementation="no_such_cache"),
    "prefix_fn_allows_nothing": greedy(prefix_allowed_tokens_fn=lambda batch_id, ids: []),
}

LENGTHS_OF_PROMPTS = [4, 17, 9]


def _hf_position_ids() -> torch.Tensor:
    width = max(LENGTHS_OF_PROMPTS)
    return torch.stack([(torch.arange(width) - (width - n)).clamp(min=0) for n in LENGTHS_OF_PROMPTS])


def _embeds() -> torch.Tensor:
    return torch.randn(3, max(LENGTHS_OF_PROMPTS), 64, generator=torch.Generator().manual_seed(5))
