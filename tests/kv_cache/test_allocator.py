"""PageAllocator against a plain set of free ids."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_accel.kv_cache.allocator import OutOfPagesError, PageAllocator


def test_first_pages_are_the_lowest_and_freed_pages_come_back_first() -> None:
    allocator = PageAllocator(8)
    assert allocator.allocate(3) == [0, 1, 2]
    allocator.free([1])
    assert allocator.allocate(2) == [1, 3]
    assert allocator.num_free == 4


def test_too_many_pages_takes_none() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(OutOfPagesError, match="3 pages asked for, 2 of 4 free"):
        allocator.allocate(3)
    assert allocator.num_free == 2
    assert sorted(allocator.allocate(2)) == [2, 3]
    assert allocator.allocate(0) == []


@pytest.mark.parametrize("page_ids", [[5], [-1], [3], [0, 0], [0, 3]])
def test_wrong_free_names_the_pages_and_frees_nothing(page_ids: list[int]) -> None:
    allocator = PageAllocator(5)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match=str(page_ids[-1])):
        allocator.free(page_ids)
    assert allocator.num_free == 3
    allocator.check_integrity()


def test_no_pages_is_a_user_error() -> None:
    with pytest.raises(ValueError, match="num_pages must be at least 1"):
        PageAllocator(0)


def test_integrity_check_sees_damage() -> None:
    allocator = PageAllocator(3)
    allocator._free.append(0)
    with pytest.raises(AssertionError, match="twice"):
        allocator.check_integrity()
    allocator = PageAllocator(3)
    allocator._free.pop()
    with pytest.raises(AssertionError, match=r"pages \[0\]"):
        allocator.check_integrity()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.randoms()), max_size=40))
def test_against_sets(num_pages: int, steps: list[tuple[bool, int, object]]) -> None:
    allocator = PageAllocator(num_pages)
    free, used = set(range(num_pages)), set[int]()
    for take, n, random in steps:
        if take and n > len(free):
            with pytest.raises(OutOfPagesError):
                allocator.allocate(n)
        elif take:
            page_ids = allocator.allocate(n)
            assert len(page_ids) == n == len(set(page_ids)) and free.issuperset(page_ids)
            free.difference_update(page_ids)
            used.update(page_ids)
        else:
            page_ids = random.sample(sorted(used), min(n, len(used)))  # type: ignore[attr-defined]
            allocator.free(page_ids)
            used.difference_update(page_ids)
            free.update(page_ids)
        assert allocator.num_free == len(free)
        assert {p for p in range(num_pages) if allocator.is_free(p)} == free
        allocator.check_integrity()
