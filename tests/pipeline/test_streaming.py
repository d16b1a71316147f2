"""Text as it comes, of one prompt and of many."""

from __future__ import annotations

import copy

import pytest

from .prompts import CHAT, GREEDY, PROMPTS


@pytest.mark.parametrize("inputs", [PROMPTS[0], CHAT], ids=["str", "chat"])
def test_stream_of_one_prompt_joins_to_its_text(plain, ours, inputs):
    pieces = list(ours(copy.deepcopy(inputs), stream=True, **GREEDY))
    expected = plain(copy.deepcopy(inputs), return_full_text=False, **GREEDY)[0]["generated_text"]
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_stream_of_a_list(plain, ours):
    texts = [""] * len(PROMPTS)
    for index, piece in ours(list(PROMPTS), stream=True, **GREEDY):
        texts[index] += piece
    assert texts == [o[0]["generated_text"] for o in plain(list(PROMPTS), return_full_text=False, **GREEDY)]


def test_stream_can_be_left_and_errors_reach_the_reader(ours):
    stream = ours(PROMPTS[:3], stream=True, do_sample=False, max_new_tokens=400)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="num_return_sequences"):
        ours(PROMPTS[0], stream=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="not_a_parameter"):
        list(ours(PROMPTS[0], stream=True, not_a_parameter=1))
