"""Absorbed latent attention: the kernels against the float64 oracle."""

from __future__ import annotations

import random

import pytest
import torch

from hf_accel_kernels import mla, mla_expanded, mla_reference
from hf_accel_kernels.mla_testing import MlaCase, make_mla_case
from hf_accel_kernels.triton_ops import mla_decode

# Largest absolute difference allowed, beside one rounding of the result; outputs are averages of standard normals.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DECODE = [(1, 1, 1), (150, 0, 33)]
MIXED = [(1, 3, 0, 1, 5, 2), (97, 40, 5, 0, 5, 1)]  # the last: more queries than keys, the first of them sees nothing


@pytest.fixture(autouse=True)
def few_processors(monkeypatch):
    """Sequences of a few hundred keys get parts of more than the least size, too."""
    monkeypatch.setattr(mla_decode, "num_processors", lambda device: 5)


def attend(case: MlaCase, device: torch.device) -> torch.Tensor:
    move = [t.to(device) for t in (case.q, case.pages, *case.tables)]
    scales = None if case.scales is None else case.scales.to(device)
    out = torch.full((*case.q.shape[:2], case.rank + 3), 9.0, dtype=case.q.dtype, device=device)
    mla_decode.mla_attention(*move, case.scale, case.rank, scales, out[..., : case.rank])
    assert (out[..., case.rank :] == 9).all()
    return out[..., : case.rank].cpu()


def check(case: MlaCase, device: torch.device) -> None:
    expected = mla_reference.mla_attention(
        case.q, case.pages, *case.tables, case.scale, rank=case.rank, scales=case.scales
    )
    dtype = case.q.dtype
    got = attend(case, device).double()
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "lens", "fp8"),
    [(3, DECODE, False), (20, DECODE, True), (20, MIXED, False), (70, DECODE, False), (3, MIXED, True)],
)
def test_heads_and_lengths(num_heads, dtype, fp8, lens, device):
    check(make_mla_case(*lens, num_heads=num_heads, dtype=dtype, fp8=fp8, seed=num_heads), device)


@pytest.mark.parametrize(
    ("rank", "rope", "page_size"), [(512, 64, 64), (256, 32, 16), (17, 3, 1), (70, 0, 5), (31, 64, 32)]
)
def test_widths_and_page_sizes(rank, rope, page_size, device):
    check(make_mla_case(*DECODE, num_heads=5, rank=rank, rope=rope, page_size=page_size, fp8=rank == 31), device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fp8_without_conversions_of_the_chip(dtype, device, monkeypatch):
    monkeypatch.setattr(mla_decode, "capability", lambda device: 80)
    check(make_mla_case((1, 3), (97, 40), num_heads=5, dtype=dtype, fp8=True), device)


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_processors(processors, device, monkeypatch):
    """Few: no sequence is split, or the long one only; many: every one is."""
    monkeypatch.setattr(mla_decode, "num_processors", lambda device: processors)
    check(make_mla_case((1, 1, 1, 2), (400, 33, 90, 150), num_heads=17, page_size=32), device)


def test_more_sequences_than_are_searched_at_once(device, monkeypatch):
    monkeypatch.setattr(mla_decode, "BLOCK_SEQS", 2)
    check(make_mla_case((1, 0, 2, 1, 1), (90, 3, 70, 0, 140), num_heads=3), device)


def test_random_batches(device):
    rng = random.Random()  # fresh every run; the message carries what is needed to repeat it
    for _ in range(8):
        seed = rng.randrange(1 << 30)
        pick = random.Random(seed)
        query_lens = [pick.choice([0, 1, 1, pick.randint(2, 9)]) for _ in range(pick.randint(1, 4))] + [1]
        case = make_mla_case(
            query_lens,
            [n + pick.choice([0, pick.randint(0, 120)]) for n in query_lens],
            num_heads=pick.choice([1, 16, pick.randint(2, 40)]),
            rank=pick.choice([32, pick.randint(1, 140)]),
            rope=pick.choice([0, 32, pick.randint(1, 50)]),
            page_size=pick.choice([16, pick.randint(1, 20)]),
            dtype=pick.choice(list(TOLERANCE)),
            fp8=pick.random() < 0.3,
            seed=seed,
        )
        try:
            check(case, device)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_lengths_may_change_between_replays(device):
    """What a CUDA graph replays: the same launches over the same tensors, with other lengths in them."""
    case = make_mla_case((1, 1, 1), (150, 90, 40), num_heads=5)
    for lens in ((150, 90, 40), (1, 0, 40), (33, 90, 2)):
        case.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        check(case, device)


def test_nan_query_stays_in_its_own_row(device):
    case = make_mla_case((1, 4), (150, 90), num_heads=5)
    clean = attend(case, device)
    case.q[2, 3, 1] = float("nan")
    got = attend(case, device)
    assert got[2, 3].isnan().all()
    got[2, 3] = clean[2, 3]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_ops_take_the_kernels_where_these_run(fp8, device, monkeypatch):
    monkeypatch.setattr(mla, "why_not", lambda device: "")
    monkeypatch.setattr(mla_expanded, "why_not", lambda device: "")
    for name in ("mla_attention", "mla_store"):
        monkeypatch.setattr(mla.mla_torch, name, None)
    monkeypatch.setattr(mla, "_cpu_ops", lambda: None)
    case = make_mla_case((1, 6), (40, 9), num_heads=3, fp8=fp8)
    slots = case.page_table[1, :1].long() * 16 + torch.arange(9)
    latents, rope_keys = mla_reference.mla_gather(case.pages, case.page_table[1], 9, case.rank, case.scales)
    rows = [t.float().to(device) for t in (latents, rope_keys)]
    pages, table, lens, starts = (t.to(device) for t in (case.pages, *case.tables))
    scales = None if case.scales is None else case.scales.to(device)
    mla.mla_store(*rows, pages, slots.to(device), scales)
    weights = mla.AbsorbedWeights(case.weight.to(device), 3, case.nope)
    q = case.heads_q.to(device)
    got = mla.mla_absorbed_attention(q, weights, pages, table, lens, starts, case.scale, scales=scales)
    arguments = (case.heads_q, case.weight, case.nope, pages.cpu(), *case.tables, case.scale)
    expected = mla_reference.mla_absorbed_attention(*arguments, scales=None if scales is None else scales.cpu())
    torch.testing.assert_close(got.cpu().double(), expected, atol=1e-4, rtol=0)
    held = mla.mla_gather(pages, table[1], 9, scales, rank=case.rank, dtype=torch.float32)
    got = mla.mla_expanded_attention(q[1:], held[0] @ case.weight.to(device).T, held[1], case.scale, nope=case.nope)
    torch.testing.assert_close(got.cpu().double(), expected[1:], atol=1e-4, rtol=0)
