"""The persistent buffers hold, after any history of steps, what the general path would build, and padding behind it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from hf_accel.engine import decode_buffers
from hf_accel.engine.decode_buffers import DecodeBuffers, Staging, StagingRing
from hf_accel.engine.forward_batch import ForwardBatch, ForwardBatchBuilder
from hf_accel.scheduler.output import ScheduledRequest, SchedulerOutput

NUM_SLOTS, WIDTH, PADDING_PAGE = 12, 40, 555


def make_builder(page_size: int, max_batch: int = 9) -> tuple[ForwardBatchBuilder, DecodeBuffers]:
    cpu = torch.device("cpu")
    buffers = DecodeBuffers(
        max_batch=max_batch,
        num_slots=NUM_SLOTS,
        width=WIDTH,
        page_size=page_size,
        padding_page=PADDING_PAGE,
        device=cpu,
    )
    return ForwardBatchBuilder(NUM_SLOTS, page_size, cpu, buffers=buffers), buffers


class History:
    """Requests that come, decode and go, as the scheduler would send them."""

    def __init__(self, page_size: int, seed: int) -> None:
        self.draw, self.page_size = random.Random(seed), page_size
        self.lengths: dict[int, int] = {}  # of the running requests, by slot

    def _request(self, slot: int, num_tokens: int, all_pages: bool) -> ScheduledRequest:
        start, size = self.lengths[slot], self.page_size
        held = 0 if all_pages else -(-start // size)
        updates = tuple((page, self.draw.randrange(500)) for page in range(held, -(-(start + num_tokens) // size)))
        tokens = tuple(self.draw.randrange(32000) for _ in range(num_tokens))
        self.lengths[slot] += num_tokens
        return ScheduledRequest(slot, slot, tokens, start, updates, 1)

    def prefill(self) -> SchedulerOutput | None:
        free = [slot for slot in range(NUM_SLOTS) if slot not in self.lengths]
        if not free:
            return None
        slots = self.draw.sample(free, self.draw.randint(1, len(free)))
        self.lengths |= dict.fromkeys(slots, 0)
        requests = tuple(self._request(slot, self.draw.randint(2, 30), True) for slot in slots)
        return SchedulerOutput(requests, sum(len(r.token_ids) for r in requests))

    def decode(self) -> SchedulerOutput | None:
        for slot in [slot for slot in self.lengths if self.draw.random() < 0.1]:
            del self.lengths[slot]
        going = [slot for slot, n in self.lengths.items() if n < WIDTH * self.page_size]
        slots = self.draw.sample(going, self.draw.randint(0, min(9, len(going))))
        return SchedulerOutput(tuple(self._request(slot, 1, False) for slot in slots), len(slots)) if slots else None


def assert_same(batch: ForwardBatch, expected: ForwardBatch, page_size: int) -> None:
    """Equal but for what a page table holds beyond a sequence's pages."""
    pages = (batch.seq_lens - 1) // page_size + 1
    used = torch.arange(batch.page_table.shape[1])[None] < pages[:, None]
    assert batch.page_table.shape == expected.page_table.shape
    for field in dataclasses.fields(batch):
        ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(ours, torch.Tensor):
            if field.name == "page_table":
                ours, theirs = ours.where(used, 0), theirs.where(used, 0)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
        elif field.name != "staged":
            assert ours == theirs, field.name


def assert_padding(buffers: DecodeBuffers, page_size: int, count: int) -> None:
    rest = slice(count, None)
    assert bool((buffers.input_ids[rest] == 0).all()) and bool((buffers.positions[rest] == 0).all())
    assert bool((buffers.slot_mapping[rest] == PADDING_PAGE * page_size).all())
    assert bool((buffers.seq_lens[rest] == 1).all()) and bool((buffers.page_table[rest] == PADDING_PAGE).all())


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_buffers_hold_what_the_general_path_builds(page_size: int) -> None:
    builder, buffers = make_builder(page_size)
    history, addresses = History(page_size, page_size), None
    num_decodes = 0
    for _ in range(120):
        output = history.prefill() if history.draw.random() < 0.2 else history.decode()
        if output is None:
            continue
        batch = builder.build(output)
        if batch.staged is None:
            assert output.num_tokens > len(output.requests)
            continue
        num_decodes += 1
        if history.draw.random() < 0.1:
            continue  # a step that never ran: its page-table changes come with the next
        before = [t.data_ptr() for t in (batch.input_ids, batch.page_table, batch.seq_lens)]
        assert addresses in (None, before)
        addresses = before
        batch.upload()
        assert_same(batch, builder._build_mixed(output), page_size)
        assert_padding(buffers, page_size, len(output.requests))
        buffers.input_ids.fill_(-1)
        batch.upload()  # only once
        assert int(buffers.input_ids.max()) == -1
    assert num_decodes > 60


def test_a_step_may_be_built_before_the_one_before_it_runs() -> None:
    builder, _ = make_builder(4)
    history = History(4, 8)
    waiting: list[tuple[SchedulerOutput, ForwardBatch, ForwardBatch]] = []
    for _ in range(80):
        output = history.prefill() if history.draw.random() < 0.1 else history.decode()
        if output is None:
            continue
        batch = builder.build(output)
        if batch.staged is not None:
            waiting.append((output, batch, builder._build_mixed(output)))
        if len(waiting) > 1:
            _, ours, expected = waiting.pop(0)
            ours.upload()
            assert_same(ours, expected, 4)


def test_a_page_that_changes_while_a_step_waits_to_run() -> None:
    builder, _ = make_builder(4)
    early = builder.build(SchedulerOutput((ScheduledRequest(0, 3, (5,), 0, ((0, 11),), 1),), 1))
    prefill = ScheduledRequest(
        1, 3, (1, 2), 0, ((0, 22),), 1
    )  # the slot has another owner, whose first step is not staged
    assert builder.build(SchedulerOutput((prefill,), 2)).staged is None
    early.upload()
    assert early.page_table.tolist() == [[11]]
    late = builder.build(SchedulerOutput((ScheduledRequest(1, 3, (5,), 2, (), 1),), 1))
    late.upload()
    assert late.page_table.tolist() == [[22]]


def test_more_page_updates_than_the_pinned_words_have_room_for() -> None:
    builder, buffers = make_builder(2)
    everyone = [
        ScheduledRequest(s, s, (1, 2), 0, tuple((i, 40 * s + i) for i in range(40)), 1) for s in range(NUM_SLOTS)
    ]
    builder.build(SchedulerOutput(tuple(everyone), 2 * NUM_SLOTS))
    output = SchedulerOutput(tuple(ScheduledRequest(s, s, (5,), 79, (), 1) for s in (11, 0, 7)), 3)
    batch = builder.build(output)
    batch.upload()
    assert_same(batch, builder._build_mixed(output), 2)
    assert not buffers._unsent


def test_steps_that_do_not_fit_are_built_anew() -> None:
    builder, buffers = make_builder(1, max_batch=2)
    three = tuple(ScheduledRequest(s, s, (5,), 0, ((0, s),), 1) for s in range(3))
    assert builder.build(SchedulerOutput(three, 3)).staged is None
    long = ScheduledRequest(3, 3, (5,), WIDTH, tuple((i, i) for i in range(WIDTH + 1)), 1)
    assert builder.build(SchedulerOutput((long,), 1)).staged is None
    batch = builder.build(SchedulerOutput((dataclasses.replace(long, start=WIDTH - 1, page_updates=()),), 1))
    assert batch.staged is not None
    batch.upload()
    assert batch.page_table.tolist() == [list(range(WIDTH))]
    assert buffers.num_bytes > 0


class FakeEvent:
    """Passed when the test says so; notes who waited."""

    def __init__(self) -> None:
        self.recorded = self.passed = self.waited = False

    def record(self) -> None:
        self.recorded, self.passed = True, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.waited |= not self.passed
        self.passed = True


def test_pinned_memory_is_not_written_while_its_copy_may_be_under_way() -> None:
    made: list[Staging] = []

    def make() -> Staging:
        made.append(Staging(torch.zeros(4, dtype=torch.int64), FakeEvent()))
        return made[-1]

    ring = StagingRing(make)
    ring.give_back(ring.take())
    assert ring.take() is made[1] and not made[0].event.waited  # rather than wait, another is made
    made.clear()
    ring = StagingRing(make)
    held = [ring.take() for _ in range(decode_buffers.MOST_STAGINGS)]
    assert held == made and len(set(map(id, held))) == 4
    for staging in held:
        ring.give_back(staging)
    assert all(staging.event.recorded for staging in made)
    made[0].event.passed = True
    assert ring.take() is made[0] and not made[0].event.waited
    assert ring.take() is made[1] and made[1].event.waited  # as many as there may be: the oldest copy is waited for
    dropped = ring.take()
    ring.give_back(made[0])
    assert dropped is made[2] and made[2].event.waited
    assert ring.take() is made[3] and ring.take() is made[0] and len(made) == 4
    assert ring.take() not in made[:4]  # all are with steps that have not run


def test_a_step_in_flight_keeps_its_own_memory() -> None:
    """The buffers' words are copied late here, as a device would: what is copied is what was staged."""
    builder, buffers = make_builder(4)
    requests = [ScheduledRequest(s, s, (100 + s,), 0, ((0, 10 + s),), 1) for s in range(6)]
    batches = [builder.build(SchedulerOutput((request,), 1)) for request in requests]
    for slot, batch in enumerate(batches):
        batch.upload()
        assert batch.input_ids.tolist() == [100 + slot] and batch.page_table.tolist() == [[10 + slot]]
        assert batch.slot_mapping.tolist() == [4 * (10 + slot)]
    assert not buffers._unsent
