"""bf16 attention on the tile unit (AMX) and on vectors alone, each against the oracle; sizes cross every tile and block."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_accel_kernels import ops, reference
from hf_accel_kernels.cpu.attention import CpuAttention
from hf_accel_kernels.testing import PagedCase, make_paged_case

TOLERANCE = 2e-2  # bf16 rounding of p and out; outputs are averages of standard normals


def attend(case: PagedCase, **options: object) -> torch.Tensor:
    return ops.paged_attention(*case.arguments(), case.scale, **options)


def check(case: PagedCase, **options: object) -> None:
    expected = reference.paged_attention(*case.arguments(), case.scale, **options)
    torch.testing.assert_close(attend(case, **options), expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(params=["tiles", "vectors"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu = CpuAttention()
    if not cpu.use_tiles(request.param == "tiles") and request.param == "tiles":
        pytest.skip("no tile unit here")
    yield request.param
    cpu.use_tiles(True)


def test_tiles_are_used_where_there_are_some() -> None:
    try:
        there = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        there = False
    if not there or "HF_ACCEL_CPU_ARCH" in os.environ:
        pytest.skip("no tile unit here, or not built for it")
    cpu = CpuAttention()
    assert cpu.use_tiles(True)
    assert not cpu.use_tiles(False)
    assert cpu.use_tiles(True)


@pytest.mark.parametrize("page_size", [1, 5, 8, 16, 48])
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (80, 80), (96, 130), (128, 128), (17, 31), (256, 40)])
def test_dims_and_pages(form: str, dims: tuple[int, int], page_size: int) -> None:
    case = make_paged_case(
        (1, 7, 0, 2, 33),
        (140, 150, 5, 18, 33),
        num_kv_heads=2,
        group=3,
        head_dim=dims[0],
        v_head_dim=dims[1],
        page_size=page_size,
        dtype=torch.bfloat16,
        seed=page_size,
    )
    check(case)


@pytest.mark.parametrize(
    ("sliding_window", "softcap"), [(0, 0.0), (1, 0.0), (37, 0.0), (600, 0.0), (0, 2.5), (150, 30.0)]
)
@pytest.mark.parametrize("sinks", [False, True])
def test_long_chunk_crosses_blocks_and_runs(form: str, sliding_window: int, softcap: float, sinks: bool) -> None:
    case = make_paged_case((300, 70), (910, 70), num_kv_heads=1, group=2, head_dim=64, dtype=torch.bfloat16)
    check(case, sliding_window=sliding_window, softcap=softcap, sinks=case.sinks if sinks else None)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_random_chunks(form: str, num_threads: int) -> None:
    rng = random.Random()  # fresh every run; the message carries what is needed to repeat it
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for _ in range(15):
            seed = rng.randrange(1 << 30)
            try:
                check_random(random.Random(seed), seed)
            except AssertionError as error:
                raise AssertionError(f"{form}, {num_threads} threads, seed {seed}: {error}") from error
    finally:
        torch.set_num_threads(before)


def check_random(pick: random.Random, seed: int) -> None:
    query_lens = [pick.choice([0, 1, pick.randint(2, 90)]) for _ in range(pick.randint(1, 4))] + [1]
    seq_lens = [n + pick.choice([0, pick.randint(0, 120), pick.randint(0, 1200)]) for n in query_lens]
    case = make_paged_case(
        query_lens,
        seq_lens,
        num_kv_heads=pick.randint(1, 2),
        group=pick.choice([1, 2, 3, 8, pick.randint(4, 20)]),
        head_dim=pick.choice([32, 64, 128, pick.randint(1, 300)]),
        v_head_dim=pick.choice([None, None, pick.randint(1, 300)]),
        page_size=pick.choice([16, 32, pick.randint(1, 40)]),
        dtype=torch.bfloat16,
        seed=seed,
    )
    check(
        case,
        sliding_window=pick.choice([0, pick.randint(1, 50), pick.randint(100, 700)]),
        softcap=pick.choice([0.0, 15.0]),
        sinks=pick.choice([None, case.sinks]),
    )


def test_negative_scale(form: str) -> None:
    case = make_paged_case((40,), (170,), num_kv_heads=1, group=2, head_dim=64, dtype=torch.bfloat16)
    expected = reference.paged_attention(*case.arguments(), -0.2)
    torch.testing.assert_close(ops.paged_attention(*case.arguments(), -0.2), expected, atol=TOLERANCE, rtol=0)


def test_nan_query_stays_in_its_row_and_unseen_keys_stay_out(form: str) -> None:
    case = make_paged_case((50,), (200,), num_kv_heads=1, group=2, head_dim=64, dtype=torch.bfloat16)
    clean = attend(case)
    case.q[30, 1] = float("nan")
    page_of_last, last_offset = case.page_table[0, 199 // 16], 199 % 16
    case.k_pages[page_of_last, :, last_offset] = float("inf")  # only the last query sees it
    got = attend(case)
    assert got.isnan().all(dim=2).nonzero().tolist() == [[30, 1], [49, 0], [49, 1]]
    broken = got.isnan()
    assert torch.equal(got[~broken], clean[~broken])


def test_extreme_logits_do_not_overflow(form: str) -> None:
    case = make_paged_case((40,), (300,), num_kv_heads=1, group=2, head_dim=64, dtype=torch.bfloat16)
    case.q.mul_(1e3)
    check(case)


def test_torch_uses_the_same_registers_in_between(form: str) -> None:
    case = make_paged_case((60, 1), (300, 90), num_kv_heads=2, group=2, head_dim=64, dtype=torch.bfloat16)
    a, q = torch.randn(256, 200).bfloat16(), torch.randn(1, 4, 300, 64).bfloat16()
    expected, product, fused = attend(case), a @ a.T, F.scaled_dot_product_attention(q, q, q, is_causal=True)
    for _ in range(5):
        assert torch.equal(a @ a.T, product)
        assert torch.equal(attend(case), expected)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), fused)
