"""KVCacheManager between requests: what is in flight, shared, duplicated, evicted and retracted."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

import pytest

from hf_accel.kv_cache.manager import KVCacheManager
from hf_accel.kv_cache.prefix_match import PageTail, PrefixMatch
from hf_accel.request import Request
from hf_accel.sampling_params import SamplingParams

IDS = itertools.count()


def make(token_ids: range | list[int], namespace: Hashable = None, logits_from: int | None = None) -> Request:
    tokens = list(token_ids)
    return Request(next(IDS), tokens, len(tokens), SamplingParams(), namespace, logits_from=logits_from)


def admit(manager: KVCacheManager, request: Request) -> PrefixMatch:
    match = manager.match_prefix(request)
    manager.admit(request, match)
    request.num_computed_tokens = match.num_tokens
    return match


def prefill(manager: KVCacheManager, request: Request, upto: int | None = None) -> tuple[tuple[int, int], ...]:
    """Compute up to a position and commit, as one scheduler step does."""
    upto = request.num_tokens if upto is None else upto
    assert manager.allocate(request.request_id, upto) is not None
    request.num_computed_tokens = upto
    updates = manager.commit(request)
    manager.check_integrity()
    return updates


def run(manager: KVCacheManager, request: Request, cache: bool = True) -> PrefixMatch:
    match = admit(manager, request)
    prefill(manager, request)
    manager.free(request, cache=cache)
    manager.check_idle()
    return match


def test_samples_of_one_prompt_share_its_pages() -> None:
    manager = KVCacheManager(32, 2)
    first, *others = samples = [make(range(9)) for _ in range(4)]
    admit(manager, first)
    prefill(manager, first)
    for request in others:
        assert admit(manager, request).num_tokens == 8
        prefill(manager, request)
    assert manager.stats == (32, 32 - 4 - 4, 4)  # four shared, and each one's partial page
    for i, request in enumerate(samples):
        request.token_ids.append(i)
        prefill(manager, request)
        request.token_ids.append(0)
        prefill(manager, request)
    for request in samples:
        manager.free(request)
    manager.check_idle()
    assert manager.stats.num_cached == 4 + 2 * 4
    assert run(manager, make([*range(9), 2, 0, 0])).num_tokens == 11


def test_a_duplicate_page_is_swapped_for_the_tree_page() -> None:
    manager = KVCacheManager(16, 2)
    one, two = make(range(8)), make([0, 1, 2, 3, 9, 9, 9, 9])
    admit(manager, one)
    admit(manager, two)  # admitted before anything was cached
    assert manager.allocate(one.request_id, 8) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert manager.allocate(two.request_id, 8) == ((0, 4), (1, 5), (2, 6), (3, 7))
    one.num_computed_tokens = two.num_computed_tokens = 8
    assert manager.commit(one) == ()
    assert manager.commit(two) == ((0, 0), (1, 1))
    manager.check_integrity()
    assert manager.stats == (16, 10, 6)
    assert manager.commit(two) == ()
    manager.free(one)
    manager.free(two)
    manager.check_idle()


def test_force_miss_finds_nothing_and_wastes_nothing() -> None:
    manager = KVCacheManager(16, 2, force_miss=True)
    run(manager, make(range(9)))
    request = make(range(9))
    assert admit(manager, request) == PrefixMatch(0, False)
    assert manager.match_prefix(make(range(9))) == PrefixMatch(0, False)
    assert [i for i, _ in prefill(manager, request)] == [0, 1, 2, 3]
    manager.free(request)
    manager.check_idle()
    assert manager.stats.num_cached == 5 and manager.take_page_copies() == ()


def test_the_next_page_is_in_flight_until_it_is_committed() -> None:
    manager = KVCacheManager(32, 2)
    first = make(range(12))
    assert not admit(manager, first).in_flight
    same, other, branch = make(range(12)), make(range(5, 12)), make([*range(6), 90, 91, 92])
    assert manager.match_prefix(same) == PrefixMatch(0, True)
    assert manager.match_prefix(branch) == PrefixMatch(0, True)
    assert manager.match_prefix(other) == PrefixMatch(0, False)
    assert not manager.match_prefix(make(range(12), namespace="other")).in_flight
    prefill(manager, first, upto=6)
    assert manager.match_prefix(same) == PrefixMatch(6, True)
    assert manager.match_prefix(branch) == PrefixMatch(6, False)
    prefill(manager, first)
    assert manager.match_prefix(same) == PrefixMatch(11, False, 0, PageTail(5, 1))  # its last page is its own
    manager.free(first)
    manager.check_idle()


def test_nothing_is_in_flight_beyond_what_a_match_may_use() -> None:
    manager = KVCacheManager(32, 4)
    admit(manager, make(range(12)))
    assert not manager.match_prefix(make(range(4))).in_flight
    assert manager.match_prefix(make(range(5))).in_flight
    assert not manager.match_prefix(make(range(12), logits_from=3)).in_flight
    assert manager.match_prefix(make(range(12), logits_from=4)).in_flight


@pytest.mark.parametrize(("num_common", "worth"), [(3, False), (4, True), (7, True)])
def test_a_partial_page_is_waited_for_if_it_saves_a_few_tokens(num_common: int, worth: bool) -> None:
    manager = KVCacheManager(32, 8)
    first, second = make(range(num_common)), make(range(12))
    admit(manager, first)
    assert manager.match_prefix(second) == PrefixMatch(0, worth)
    prefill(manager, first)
    assert manager.match_prefix(second) == PrefixMatch(num_common, False, 0, PageTail(0, num_common))


def test_a_page_is_waited_for_if_what_lacks_is_worth_it() -> None:
    manager = KVCacheManager(32, 8)
    run(manager, make(range(7)))
    first, same, other = make(range(30)), make(range(30)), make([*range(8), 50, 51, 52, 53])
    assert admit(manager, first).num_tokens == 7
    assert manager.match_prefix(same) == PrefixMatch(7, True, 0, PageTail(0, 7))
    assert manager.match_prefix(other) == PrefixMatch(7, False, 0, PageTail(0, 7))  # a step for one token
    prefill(manager, first, upto=29)
    assert manager.match_prefix(same) == PrefixMatch(29, False, 0, PageTail(4, 5))
    assert manager.match_prefix(other) == PrefixMatch(8, False)


def test_nobody_waits_for_tokens_that_are_computed_but_not_committed() -> None:
    manager = KVCacheManager(32, 4)
    first = make(range(6))
    admit(manager, first)
    prefill(manager, first)
    first.token_ids += range(6, 16)  # decodes
    manager.allocate(first.request_id, 16)
    first.num_computed_tokens = 15
    assert manager.match_prefix(make(range(16))) == PrefixMatch(6, False, 0, PageTail(1, 2))
    manager.free(first)
    assert manager.match_prefix(make(range(16))).num_tokens == 15


def test_a_live_page_is_copied_while_its_request_writes_on() -> None:
    manager = KVCacheManager(32, 4)
    first, *others = samples = [make(range(6)) for _ in range(4)]
    admit(manager, first)
    prefill(manager, first)
    for step in range(3):
        first.token_ids.append(100 + step)
        manager.allocate(first.request_id, first.num_tokens)
        first.num_computed_tokens += 1
        request = others[step]
        assert admit(manager, request) == PrefixMatch(5, False, 0, PageTail(1, 1))
        prefill(manager, request)
    own = [manager.page_ids(request.request_id)[1] for request in others]
    assert manager.take_page_copies() == tuple((1, page_id) for page_id in own)  # of the oldest each
    for request in samples:
        manager.free(request)
    manager.check_idle()


def test_a_failed_request_leaves_no_partial_page() -> None:
    manager = KVCacheManager(32, 4)
    run(manager, make(range(6)), cache=False)
    assert manager.stats.num_cached == 1  # committed while it was well
    assert manager.match_prefix(make(range(6))) == PrefixMatch(4, False, 1)


@pytest.mark.parametrize("cache", [True, False])
def test_an_ended_request_takes_back_its_own_in_flight_mark_only(cache: bool) -> None:
    manager = KVCacheManager(32, 2)
    one, two, late = make(range(8)), make(range(8)), make(range(9))
    admit(manager, one)
    admit(manager, two)
    manager.free(one, cache=cache)
    assert manager.match_prefix(late).in_flight
    manager.free(two, cache=cache)
    assert not manager.match_prefix(late).in_flight
    manager.check_idle()


def test_a_retracted_request_comes_back_as_a_new_one() -> None:
    manager = KVCacheManager(32, 2)
    request = make(range(9))
    admit(manager, request)
    prefill(manager, request, upto=7)
    request.token_ids += [20, 21]
    manager.free(request)
    request.num_computed_tokens = 0
    manager.check_idle()
    assert not manager.match_prefix(make(range(20))).in_flight
    assert admit(manager, request).num_tokens == 7
    assert manager.match_prefix(make(range(12))).num_tokens == 7
    prefill(manager, request)
    manager.free(request)
    manager.check_idle()
    assert run(manager, make([*request.token_ids, 1])).num_tokens == 11


def test_allocate_evicts_what_it_needs_and_no_locked_page() -> None:
    manager = KVCacheManager(8, 2)
    run(manager, make(range(100, 108)))
    held = make([*range(100, 104), 1])
    assert admit(manager, held).num_tokens == 4
    prefill(manager, held)
    assert (manager.stats.num_free, manager.num_available_pages) == (3, 5)
    request = make(range(12))
    admit(manager, request)
    assert manager.pages_needed(request.request_id, 12) == 6
    assert manager.allocate(request.request_id, 12) is None
    assert (manager.stats.num_free, manager.num_available_pages) == (3, 5)
    updates = manager.allocate(request.request_id, 8)
    assert updates is not None and [i for i, _ in updates] == [0, 1, 2, 3]
    assert (manager.stats.num_free, manager.num_available_pages) == (0, 1)
    manager.check_integrity()
    assert manager.allocate(request.request_id, 8) == ()
    assert manager.allocate(request.request_id, 3) == ()
    manager.free(request, cache=False)
    manager.free(held)
    manager.check_idle()
    assert admit(manager, make(range(100, 108))).num_tokens == 6


def test_a_match_counts_the_available_pages_that_admission_takes() -> None:
    manager = KVCacheManager(16, 2)
    run(manager, make(range(9)))
    first, second = make(range(9)), make(range(9))
    match = manager.match_prefix(first)
    assert match.num_unlocked_pages == 4
    before = manager.num_available_pages
    manager.admit(first, match)
    assert manager.num_available_pages == before - 4
    assert manager.match_prefix(second) == PrefixMatch(8, False, 0)
    assert manager.pages_needed(None, 9) == 5 and manager.pages_needed(first.request_id, 9) == 1


def test_admit_refuses_a_stale_match_and_a_second_admission() -> None:
    manager = KVCacheManager(4, 2)
    run(manager, make(range(7)))
    request, greedy = make(range(7)), make(range(50, 58))
    match = manager.match_prefix(request)
    admit(manager, greedy)
    assert manager.allocate(greedy.request_id, 8) is not None
    with pytest.raises(AssertionError, match="stale match"):
        manager.admit(request, match)
    with pytest.raises(AssertionError, match="admitted already"):
        manager.admit(greedy, PrefixMatch(0, False))
    manager.check_integrity()


def test_a_pool_of_one_page_works() -> None:
    manager = KVCacheManager(1, 4)
    for start in (0, 10, 0):
        assert run(manager, make(range(start, start + 4))).num_tokens == 0
    assert run(manager, make([0, 1, 2])).num_tokens == 2
    assert manager.take_page_copies() == ()  # the page itself was taken over
    assert manager.pages_needed(None, 5) == 2


def test_a_waiting_request_leaves_nothing_behind() -> None:
    manager = KVCacheManager(8, 2)
    for salt in range(100):
        manager.match_prefix(make(range(9), namespace=salt))
    assert not list(manager._tree.nodes())
    manager.check_idle()
