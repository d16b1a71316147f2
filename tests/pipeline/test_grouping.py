"""Which prompts go into one call, and where each row of its result ended."""

from __future__ import annotations

from transformers import AutoTokenizer

from hf_accel.demo.model import shipped_model
from hf_accel.pipeline.batching import EndFinder
from hf_accel.pipeline.grouping import Grouping, grouping_of, make_groups


def test_grouping_of_parameters():
    assert grouping_of({"max_new_tokens": 4, "do_sample": True, "temperature": 0.7}) is Grouping.TOGETHER
    assert grouping_of({"max_length": 40}) is Grouping.EQUAL_LENGTH
    assert grouping_of({"max_length": 40, "max_new_tokens": 4, "num_beams": 1}) is Grouping.TOGETHER
    assert grouping_of({"max_length": 40, "num_beams": 2}) is Grouping.ALONE
    assert grouping_of({"something_new": 1}) is Grouping.ALONE
    assert grouping_of({"stop_strings": ["x"]}) is Grouping.ALONE
    assert grouping_of({"stop_strings": ["x"], "eos_token_id": 1}) is Grouping.TOGETHER
    assert make_groups([3, 0, 5, 3], Grouping.TOGETHER) == [[0, 2, 3], [1]]
    assert make_groups([3, 0, 5, 3], Grouping.EQUAL_LENGTH) == [[0, 3], [1], [2]]
    assert make_groups([3, 0, 5, 3], Grouping.ALONE) == [[0], [1], [2], [3]]


def test_where_a_sequence_ended():
    plain_end = EndFinder({"eos_token_id": [1, 9], "pad_token_id": 2})
    assert plain_end.num_new_tokens([5, 5, 7, 9, 2, 2], 2) == 2
    assert plain_end.num_new_tokens([5, 5, 7, 8, 2, 2], 2) == 4  # a pad that was really generated
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    stop, other = tokenizer.convert_tokens_to_ids(["e", "x"])
    ends = EndFinder({"eos_token_id": 1, "pad_token_id": 1, "stop_strings": ["e"], "tokenizer": tokenizer})
    assert ends.num_new_tokens([other, other, stop, 1, 1], 1) == 2  # stopped, then padding that looks like eos
    assert ends.num_new_tokens([other, other, other, 1, 1], 1) == 3  # eos, then padding
    assert ends.num_new_tokens([stop, 1, 1], 1) == 1  # the prompt's own "e" stops nothing
