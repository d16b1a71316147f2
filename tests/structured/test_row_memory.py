"""Rows found again by their ids."""

from __future__ import annotations

import random

import torch

from hf_accel.structured import row_memory as module
from hf_accel.structured.row_memory import RowMemory, row_hashes

CPU = torch.device("cpu")


def test_hashes_tell_rows_lengths_and_owners_apart():
    rng, seen = random.Random(), {}
    for _ in range(300):
        length, owner = rng.randint(0, 4), rng.randint(1, 3)
        row = [rng.choice([0, 1, 2, 50_000]) for _ in range(length)]
        value = int(row_hashes(torch.tensor([row], dtype=torch.long).reshape(1, length), torch.tensor([owner])))
        assert seen.setdefault(value, (row, owner)) == (row, owner)


def test_rows_are_found_with_their_latest_values(monkeypatch):
    monkeypatch.setattr(module, "_STEPS", 40)
    memory, rng = RowMemory(CPU), random.Random()
    expected: dict[tuple[int, int], tuple[int, int]] = {}
    order: list[list[tuple[int, int]]] = []
    for step in range(120):
        length = rng.randint(1, 6)
        rows = rng.sample(range(9), rng.randint(1, 4))
        state, generated = torch.arange(len(rows)) + 100 * step, torch.full((len(rows),), step)
        memory.add(torch.tensor(rows), length, state, generated)
        order.append([(length, row) for row in rows])
        expected |= {(length, row): (100 * step + i, step) for i, row in enumerate(rows)}
        kept = {at for one in order[-40:] for at in one}
        for length in range(7):
            found, states, numbers = memory.find(torch.arange(9), length)
            for row in range(9):
                assert bool(found[row]) == ((length, row) in kept)
                if found[row]:
                    assert (int(states[row]), int(numbers[row])) == expected[length, row]
    assert memory.most_generated(99) == 0


def test_the_most_that_can_have_been_generated():
    memory, one = RowMemory(CPU), torch.zeros(1, dtype=torch.long)
    assert [memory.most_generated(n) for n in (4, 5)] == [0, 0]
    for length in (4, 5, 6):
        memory.add(one, length, one, one)
    assert [memory.most_generated(n) for n in (4, 5, 6, 7, 8)] == [0, 1, 2, 3, 0]
