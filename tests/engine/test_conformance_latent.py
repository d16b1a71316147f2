"""The conformance grid for models that keep latents (DeepSeek): the axes of `test_conformance`, and how they attend."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel_kernels import mla

from ..patching.configs import left_padded, make_model
from . import test_conformance as grid

FORMS: dict[str, Callable[[int, int, int], bool]] = {
    "absorbed": lambda num_new, num_total, num_heads: False,
    "expanded": lambda num_new, num_total, num_heads: True,
    "mixed": lambda num_new, num_total, num_heads: num_total % 2 == 0,
}
"""Which of a step's sequences are expanded, in place of the choice by cost, which wants longer ones."""
AXES: dict[str, Sequence[Any]] = {
    **grid.AXES,
    "family": ("deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "deepseek_v3_halves", "deepseek_v3_yarn"),
    "path": ("cpu", "torch"),
    "form": tuple(FORMS),
}
GRID = list(grid.pairwise(AXES, seed=1))


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[PreTrainedModel, list[list[int]]]]:
    """Each family's model and HF's continuation of each prompt, one by one."""
    models = {family: make_model(family) for family in AXES["family"]}
    return {name: (m, [grid.hf_continuation(m, prompt) for prompt in grid.PROMPTS]) for name, m in models.items()}


@pytest.mark.parametrize("point", GRID, ids=grid.grid_id)
def test_engine(
    point: dict[str, Any],
    references: dict[str, tuple[PreTrainedModel, list[list[int]]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests in waves with an abort, then all at once; every token is HF's."""
    monkeypatch.setattr(mla, "prefer_expanded", FORMS[point["form"]])
    model, expected = references[point["family"]]
    engine = Engine(model, **grid.engine_options(point))
    order = random.Random(grid.grid_id(point))
    lengths = [order.randint(1, grid.NEW_TOKENS) for _ in grid.PROMPTS]
    lengths[grid.ABORTED] = grid.NEW_TOKENS
    for index, output in grid.run_in_waves(engine, order, lengths).items():
        for completion in output.outputs:
            assert completion.token_ids == expected[index][: len(completion.token_ids)], f"prompt {index}"
            assert index == grid.ABORTED or len(completion.token_ids) == lengths[index]
    again = engine.generate(grid.PROMPTS, SamplingParams(temperature=0.0, max_tokens=grid.NEW_TOKENS))
    assert [o.outputs[0].token_ids for o in again] == expected
    grid.check_what_happened(point, engine)
    engine.shutdown()


@pytest.mark.parametrize("family", AXES["family"])
def test_patched_generate(family: str, references: dict[str, tuple[PreTrainedModel, list[list[int]]]]) -> None:
    """A padded batch natively, and one through HF's processors with everything returned."""
    model, expected = references[family]
    chosen = [1, 3, 6, 9, 11]
    lengths = [len(grid.PROMPTS[i]) for i in chosen]
    input_ids, mask = left_padded(lengths)
    for row, i in enumerate(chosen):
        input_ids[row, max(lengths) - lengths[row] :] = torch.tensor(grid.PROMPTS[i])
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    more = {"repetition_penalty": 1.4, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    penalised = model.generate(input_ids, **options, **more)
    with hf_accel.patch(model, page_size=4, num_pages=128):
        for _ in range(2):
            got = model.generate(input_ids, max_new_tokens=grid.NEW_TOKENS, **options)
            assert got[:, max(lengths) :].tolist() == [expected[i] for i in chosen]
        result = model.generate(input_ids, **options, **more)
        assert hf_accel.get_engine(model).stats().fallback_reasons == {}
    assert torch.equal(result.sequences, penalised.sequences)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(penalised.logits), rtol=0, atol=2e-4)
    cached = mask.bool()
    for ours, theirs in zip(result.past_key_values.layers, penalised.past_key_values.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape == b.shape and a.dtype == b.dtype
            width = mask.shape[1]
            torch.testing.assert_close(a[:, 0, :width][cached], b[:, 0, :width][cached], rtol=0, atol=2e-4)
            torch.testing.assert_close(a[:, 0, width:], b[:, 0, width:], rtol=0, atol=2e-4)
