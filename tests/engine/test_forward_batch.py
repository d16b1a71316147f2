"""The batch builder: its two paths agree, and rows follow their page updates."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from hf_accel.engine.forward_batch import ForwardBatchBuilder
from hf_accel.scheduler.output import UNKNOWN_TOKEN, ScheduledRequest, SchedulerOutput


def _decode_step(draw: random.Random, page_size: int, num_seqs: int) -> SchedulerOutput:
    slots = draw.sample(range(64), num_seqs)
    requests = []
    for index, slot in enumerate(slots):
        start = draw.randrange(300)
        updates = tuple((page, draw.randrange(9999)) for page in range(start // page_size + 1))
        token_id = draw.choice((draw.randrange(32000), UNKNOWN_TOKEN))
        requests.append(ScheduledRequest(index, slot, (token_id,), start, updates, 1))
    return SchedulerOutput(tuple(requests), num_seqs)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_decode_path_builds_what_the_general_path_builds(page_size: int) -> None:
    draw = random.Random(page_size)
    for step in range(30):
        builder = ForwardBatchBuilder(64, page_size, torch.device("cpu"), token_table=step % 2 == 1)
        output = _decode_step(draw, page_size, draw.randint(1, 20))
        decode, mixed = builder.build(output), builder._build_mixed(output)
        for field in dataclasses.fields(decode):
            ours, general = getattr(decode, field.name), getattr(mixed, field.name)
            if isinstance(ours, torch.Tensor):
                assert ours.dtype == general.dtype and ours.is_contiguous(), field.name
                assert torch.equal(ours, general), field.name
            else:
                assert ours == general, field.name


def test_slots_and_pages_of_a_decode_step() -> None:
    builder = ForwardBatchBuilder(4, 4, torch.device("cpu"))
    requests = (
        ScheduledRequest(7, 2, (11,), 5, ((0, 30), (1, 31)), 1),
        ScheduledRequest(8, 0, (12,), 0, ((0, 9),), 1),
    )
    batch = builder.build(SchedulerOutput(requests, 2))
    assert batch.input_ids.tolist() == [11, 12]
    assert batch.positions.tolist() == [5, 0]
    assert batch.slot_mapping.tolist() == [31 * 4 + 1, 9 * 4]
    assert batch.page_table[0].tolist() == [30, 31]
    assert batch.page_table[1, 0].item() == 9
    assert batch.seq_lens.tolist() == [6, 1]


def test_a_prefill_chunk_without_logits_takes_the_general_path() -> None:
    builder = ForwardBatchBuilder(4, 4, torch.device("cpu"))
    chunk = ScheduledRequest(1, 0, (5,), 0, ((0, 3),), 0)
    batch = builder.build(SchedulerOutput((chunk,), 1))
    assert batch.logits_indices.tolist() == [] and batch.num_logits_cpu == (0,)


@pytest.mark.parametrize("length", [1, 3])
def test_slots_of_the_token_table(length: int) -> None:
    builder = ForwardBatchBuilder(8, 4, torch.device("cpu"), token_table=True)
    requests = (
        ScheduledRequest(7, 2, (UNKNOWN_TOKEN,), 5, ((0, 3), (1, 1)), 1),
        ScheduledRequest(8, 6, (12,) * length, 0, ((0, 5),), 1),
    )
    batch = builder.build(SchedulerOutput(requests, 1 + length))
    assert batch.token_slots is not None and batch.token_slots.tolist() == [2] + [6] * length
    assert batch.has_unknown and batch.input_ids.tolist() == [UNKNOWN_TOKEN] + [12] * length
    kept = batch.page_table.clone()
    again = (ScheduledRequest(9, 2, (4,), 0, ((0, 7), (1, 7)), 1),)
    assert not builder.build(SchedulerOutput(again, 1)).has_unknown
    assert torch.equal(batch.page_table, kept)  # the first batch may run only now
