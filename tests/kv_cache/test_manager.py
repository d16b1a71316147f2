"""KVCacheManager's rules, one by one. Random orders of them are in test_manager_model.py."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Hashable
from typing import Any

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


def test_imports_neither_torch_nor_transformers() -> None:
    code = "import hf_accel.kv_cache.manager, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 5, 8, 9, 100])
def test_a_second_equal_prompt_leaves_its_last_token_to_compute(page_size: int) -> None:
    manager = KVCacheManager(16, page_size)
    assert run(manager, make(range(9))).num_tokens == 0
    for _ in range(3):
        match = run(manager, make(range(9)))
        assert (match.num_tokens, match.num_shared_tokens) == (8, 8 // page_size * page_size)


def test_a_page_that_holds_the_last_token_is_copied_not_shared() -> None:
    manager = KVCacheManager(16, 4)
    run(manager, make(range(8)))
    assert run(manager, make(range(8))) == PrefixMatch(7, False, 1, PageTail(1, 3))
    assert manager.take_page_copies() == ((1, 2),)
    assert manager.stats.num_cached == 2  # computed whole, the copy was found to be the tree's page again
    assert run(manager, make(range(9))).num_tokens == 8
    assert run(manager, make([5])).num_tokens == 0


def test_a_partial_page_is_cached_and_copied() -> None:
    manager = KVCacheManager(16, 4)
    run(manager, make(range(7)))
    assert manager.stats == (16, 14, 2)
    assert run(manager, make([*range(5), 70, 71])) == PrefixMatch(5, False, 1, PageTail(1, 1))
    assert manager.take_page_copies() == ((1, 2),)
    assert run(manager, make(range(7))) == PrefixMatch(6, False, 1, PageTail(1, 2))
    assert manager.stats == (16, 13, 3)  # two partial pages: 4 5 6 and 4 70 71
    assert run(manager, make(range(12))).num_tokens == 7
    assert manager.stats == (16, 12, 4)  # 4 5 6 went into 4 5 6 7, and 8 9 10 11 is new
    assert manager.take_page_copies() == ((1, 3), (1, 3))
    assert manager.take_page_copies() == ()


def test_a_partial_page_that_another_begins_with_is_not_kept() -> None:
    manager = KVCacheManager(16, 4)
    run(manager, make([1, 2, 3]))
    run(manager, make([1, 2]))
    assert manager.stats.num_cached == 1
    run(manager, make([1, 2, 3, 4]))
    assert manager.stats.num_cached == 1
    run(manager, make([1, 2, 3]))
    assert manager.stats.num_cached == 1
    assert run(manager, make([1, 2, 3, 4])).num_tokens == 3


def test_a_copied_page_is_committed_when_it_is_full() -> None:
    manager = KVCacheManager(16, 4)
    run(manager, make(range(6)))
    request = make([*range(6), 60, 61, 62, 63])
    assert admit(manager, request).num_tokens == 6
    prefill(manager, request, upto=7)
    assert manager.stats.num_cached == 2
    prefill(manager, request, upto=9)
    assert manager.stats.num_cached == 2  # the full page took the partial one's place
    manager.free(request)
    manager.check_idle()
    assert run(manager, make(request.token_ids)).num_tokens == 9


def test_no_tail_without_a_page_for_the_copy() -> None:
    manager = KVCacheManager(2, 4)
    run(manager, make(range(7)))
    assert manager.match_prefix(make(range(7))).num_tokens == 6
    hog = make([50, 51])
    admit(manager, hog)
    manager.allocate(hog.request_id, 2)  # takes the partial page
    assert manager.match_prefix(make(range(7))) == PrefixMatch(4, False, 1)
    manager.free(hog)
    manager.check_idle()


def test_a_source_that_is_evicted_for_its_copy_is_taken_over() -> None:
    manager = KVCacheManager(2, 4)
    run(manager, make(range(7)))
    request = make([*range(6), 60])
    match = admit(manager, request)
    assert match.tail == PageTail(1, 2) and manager.page_ids(request.request_id) == (0, 1)
    assert manager.take_page_copies() == ()
    manager.free(request, cache=False)
    manager.check_idle()


@pytest.mark.parametrize(("logits_from", "hit"), [(0, 0), (3, 3), (4, 4), (7, 7), (8, 8), (50, 16), (None, 16)])
def test_a_match_ends_before_the_first_needed_logits(logits_from: int | None, hit: int) -> None:
    manager = KVCacheManager(16, 4)
    run(manager, make(range(17)))
    assert run(manager, make(range(17), logits_from=logits_from)).num_tokens == hit


def test_only_computed_tokens_are_cached() -> None:
    manager = KVCacheManager(16, 2)
    request = make(range(8))
    admit(manager, request)
    assert manager.allocate(request.request_id, 8) == ((0, 0), (1, 1), (2, 2), (3, 3))
    request.num_computed_tokens = 5
    manager.free(request)
    assert manager.stats == (16, 13, 3)
    assert admit(manager, make(range(8))).num_tokens == 5


def test_free_without_cache_keeps_only_what_was_committed() -> None:
    manager = KVCacheManager(16, 2)
    request = make(range(8))
    admit(manager, request)
    prefill(manager, request, upto=4)
    manager.allocate(request.request_id, 8)
    request.num_computed_tokens = 8
    manager.free(request, cache=False)
    manager.check_idle()
    assert manager.stats.num_cached == 2


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    manager = KVCacheManager(32, 4)
    request = make(range(6))
    admit(manager, request)
    prefill(manager, request)
    for token in range(100, 110):
        request.token_ids.append(token)
        manager.allocate(request.request_id, request.num_tokens)
        request.num_computed_tokens += 1
    manager.free(request)
    turn = make([*request.token_ids, 7, 7, 7])
    assert run(manager, turn).num_tokens == 16
    assert run(manager, make(request.token_ids[:14])).num_tokens == 13


def test_commits_during_decode_make_no_chain_of_small_nodes() -> None:
    manager = KVCacheManager(200, 1)
    request = make(range(3))
    admit(manager, request)
    prefill(manager, request)
    for token in range(100):
        request.token_ids.append(token)
        prefill(manager, request)
    assert sum(1 for _ in manager._tree.nodes()) == 2  # the root and one leaf
    manager.free(request)
    assert run(manager, make(request.token_ids)).num_tokens == 102


def test_without_a_prefix_cache_every_page_comes_back() -> None:
    manager = KVCacheManager(8, 2, enable_prefix_cache=False)
    request = make(range(9))
    assert admit(manager, request) == PrefixMatch(0, False)
    assert manager.match_prefix(make(range(9))) == PrefixMatch(0, False)
    assert prefill(manager, request) == ()
    assert manager.stats == (8, 3, 0)
    manager.free(request)
    manager.check_idle()
    assert manager.stats == (8, 8, 0)


def test_namespaces_share_nothing() -> None:
    manager = KVCacheManager(32, 2)
    run(manager, make(range(9), namespace=("v1", None)))
    assert run(manager, make(range(9), namespace=("v2", None))).num_tokens == 0
    assert run(manager, make(range(9), namespace=("v1", None))).num_tokens == 8
    assert manager.clear_namespace(("v1", None)) == 5
    manager.check_idle()
    assert run(manager, make(range(9), namespace=("v2", None))).num_tokens == 8
    assert manager.clear_namespace("unknown") == 0


def test_a_running_request_keeps_its_pages_when_its_namespace_is_cleared() -> None:
    manager = KVCacheManager(32, 2)
    run(manager, make(range(9)))
    request = make([*range(5), 50, 51, 52])
    assert admit(manager, request).num_tokens == 5
    assert manager.clear_namespace(None) == 3
    prefill(manager, request)
    manager.free(request)
    manager.check_idle()


def test_unknown_requests_raise_key_error() -> None:
    manager = KVCacheManager(4, 2)
    request = make(range(3))
    for action in (manager.free, manager.commit):
        with pytest.raises(KeyError):
            action(request)
    with pytest.raises(KeyError):
        manager.free(request, cache=False)
    with pytest.raises(KeyError):
        manager.allocate(request.request_id, 1)
    run(manager, request)
    with pytest.raises(KeyError):
        manager.free(request)


def test_reset_refuses_while_pages_are_held() -> None:
    manager = KVCacheManager(8, 2)
    run(manager, make(range(9)))
    request = make(range(3))
    admit(manager, request)
    with pytest.raises(RuntimeError, match="1 request"):
        manager.reset()
    manager.free(request)
    manager.reset()
    manager.check_idle()
    assert manager.stats == (8, 8, 0) and manager.match_prefix(make(range(9))).num_tokens == 0


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="page_size"):
        KVCacheManager(4, 0)
    with pytest.raises(ValueError, match="num_pages"):
        KVCacheManager(0, 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m, h: m._tree.lock(h.node), "without a request"),
        (lambda m, h: m._next_pages._holdings.clear(), "in-flight marks differ"),
        (lambda m, h: m._next_pages._holdings.update({(h.node, (7,)): [h]}), "in-flight marks differ"),
        (lambda m, h: setattr(h, "next_key", (4,)), "mark of another page"),
        (lambda m, h: m._next_pages._keys[h.node].append((9,)), "sorted keys"),
        (lambda m, h: h.request.token_ids.__setitem__(4, 70), "computes a page of other tokens"),
        (lambda m, h: m._allocator.free([h.page_ids[-1]]), "free pages with an owner"),
        (lambda m, h: m._allocator.allocate(1), "1 pages lost"),
        (lambda m, h: h.page_ids.append(h.page_ids[0]), "two owners"),
        (lambda m, h: h.page_ids.pop(), "1 pages lost"),
        (lambda m, h: h.request.page_keys.__setitem__(0, (7, 7)), "other tokens"),
        (lambda m, h: setattr(h.request, "namespace", 5), "namespace"),
        (lambda m, h: h.page_ids.__setitem__(slice(0, 2), h.page_ids[1::-1]), "lost its tree pages"),
    ],
)
def test_integrity_check_sees_damage(damage: Callable[[KVCacheManager, Any], Any], message: str) -> None:
    manager = KVCacheManager(16, 2)
    request = make(range(9))
    admit(manager, request)
    prefill(manager, request, upto=4)
    manager.allocate(request.request_id, 9)
    manager.check_integrity()
    with pytest.raises(AssertionError, match="requests still hold pages"):
        manager.check_idle()
    damage(manager, manager._holdings[request.request_id])
    with pytest.raises(AssertionError, match=message):
        manager.check_integrity()


def test_a_commit_costs_the_new_pages_not_the_context() -> None:
    def calls(num_pages: int) -> int:
        manager = KVCacheManager(num_pages + 4, 1)
        request = make(range(num_pages))
        admit(manager, request)
        prefill(manager, request)
        request.token_ids += [1, 2]
        manager.allocate(request.request_id, request.num_tokens)
        request.num_computed_tokens += 2
        num_lines = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal num_lines
            num_lines += event == "line"
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            manager.commit(request)
        finally:
            sys.settrace(previous)
        return num_lines

    assert calls(10) == calls(5000) < 200
