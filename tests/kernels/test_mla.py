"""Latent attention's ops against the float64 oracle, on fresh random odd shapes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch

from hf_accel_kernels import mla, mla_reference
from hf_accel_kernels.cpu.mla import CpuMla
from hf_accel_kernels.mla_testing import FP8, MlaCase, make_mla_case

# Largest absolute difference allowed, beside one rounding of the result; outputs are averages of standard normals.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MIXED = [(1, 1, 7, 0, 1, 33), (97, 1, 40, 5, 18, 33)]  # query_lens, seq_lens: decode, prefill chunks, an idle row


def attend(case: MlaCase, **options: object) -> torch.Tensor:
    options = {"scales": case.scales, **options}
    return mla.mla_attention(case.q, case.pages, *case.tables, case.scale, rank=case.rank, **options)


def expected_of(case: MlaCase) -> torch.Tensor:
    arguments = (case.q, case.pages, *case.tables, case.scale)
    return mla_reference.mla_attention(*arguments, rank=case.rank, scales=case.scales)


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype] * factor, rtol=torch.finfo(dtype).eps)


def check_absorbed(case: MlaCase, **options: object) -> torch.Tensor:
    weights = mla.AbsorbedWeights(case.weight, case.q.shape[1], case.nope, **options)
    arguments = (case.pages, *case.tables, case.scale)
    got = mla.mla_absorbed_attention(case.heads_q, weights, *arguments, scales=case.scales)
    reference = mla_reference.mla_absorbed_attention
    close(got, reference(case.heads_q, case.weight, case.nope, *arguments, scales=case.scales), case.q.dtype, 2)
    return got


@pytest.fixture(autouse=True, params=["cpu", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on the C++ ops, which must be there, and on the torch forms."""
    if request.param == "cpu":
        CpuMla()  # the ops would fall back silently, and the comparison would test the torch form twice
    else:
        monkeypatch.setattr(mla, "_cpu_ops", lambda: None)
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_heads", [1, 3, 16, 20, 128])
def test_head_counts(num_heads: int, dtype: torch.dtype) -> None:
    case = make_mla_case(*MIXED, num_heads=num_heads, rank=64, rope=16, dtype=dtype, seed=num_heads)
    close(attend(case), expected_of(case), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rank", "rope"), [(16, 8), (40, 8), (40, 64), (512, 64), (17, 3), (31, 4), (70, 0), (96, 32)])
@pytest.mark.parametrize("fp8", [False, True])
def test_widths(rank: int, rope: int, dtype: torch.dtype, fp8: bool) -> None:
    case = make_mla_case(*MIXED, num_heads=5, rank=rank, rope=rope, dtype=dtype, fp8=fp8, seed=rank)
    close(attend(case), expected_of(case), dtype)


@pytest.mark.parametrize("page_size", [1, 5, 16, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_page_sizes(page_size: int, dtype: torch.dtype, fp8: bool) -> None:
    case = make_mla_case(
        *MIXED, num_heads=3, rank=64, rope=32, page_size=page_size, dtype=dtype, fp8=fp8, seed=page_size
    )
    close(attend(case), expected_of(case), dtype)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_split_keys_and_every_tile(num_threads: int, dtype: torch.dtype) -> None:
    """With two threads the keys of one long sequence are split and the parts merged."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        for query_len, seq_len in ((1, 1500), (3, 1100), (40, 1025), (150, 290)):
            case = make_mla_case((query_len,), (seq_len,), num_heads=4, rank=64, rope=32, dtype=dtype)
            close(attend(case), expected_of(case), dtype)
            check_absorbed(case)
    finally:
        torch.set_num_threads(before)


def test_random_batches() -> None:
    rng = random.Random()  # fresh every run; the message carries what is needed to repeat it
    for _ in range(25):
        seed = rng.randrange(1 << 30)
        pick = random.Random(seed)
        query_lens = [pick.choice([0, 1, 1, pick.randint(2, 30)]) for _ in range(pick.randint(1, 4))] + [1]
        case = make_mla_case(
            query_lens,
            [n + pick.choice([0, pick.randint(0, 200)]) for n in query_lens],
            num_heads=pick.choice([1, 2, pick.randint(3, 40)]),
            rank=pick.choice([32, 64, pick.randint(1, 140)]),
            rope=pick.choice([0, 32, 64, pick.randint(1, 50)]),
            nope=pick.randint(1, 140),
            v=pick.randint(1, 140),
            page_size=pick.choice([16, 32, pick.randint(1, 20)]),
            dtype=pick.choice(list(TOLERANCE)),
            fp8=pick.random() < 0.3,
            seed=seed,
        )
        try:
            close(attend(case), expected_of(case), case.q.dtype)
            check_absorbed(case)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("nope", "v"), [(16, 128), (128, 16), (33, 50)])
@pytest.mark.parametrize("packed", [True, False])
def test_absorbed(nope: int, v: int, dtype: torch.dtype, packed: bool) -> None:
    for num_heads, rank, rope in ((1, 16, 8), (16, 512, 64), (20, 40, 8)):
        case = make_mla_case(*MIXED, num_heads=num_heads, rank=rank, rope=rope, nope=nope, v=v, dtype=dtype, seed=nope)
        check_absorbed(case, packed=packed)


def test_absorbed_in_chunks_of_tokens() -> None:
    """More queries than are absorbed at a time: tables of parts of sequences."""
    case = make_mla_case((1, 3000, 2, 900), (30, 3010, 2, 900), num_heads=16, rank=128, rope=32)
    weights = mla.AbsorbedWeights(case.weight, 16, case.nope)
    got = mla.mla_absorbed_attention(case.heads_q, weights, case.pages, *case.tables, case.scale)
    one = (case.page_table[1:2], case.seq_lens[1:2], torch.tensor([0, 3000], dtype=torch.int32))
    alone = mla.mla_absorbed_attention(case.heads_q[1:3001], weights, case.pages, *one, case.scale)
    torch.testing.assert_close(got[1:3001], alone, atol=1e-5, rtol=0)
    some = torch.tensor([0, 1, 1500, 3000, 3001, 3002, 3003, 3902])
    expected = mla_reference.mla_absorbed_attention
    tables = (
        case.page_table[[0, 1, 1, 1, 2, 2, 3, 3]],
        torch.tensor([30, 11, 1510, 3010, 1, 2, 1, 900]),
        torch.arange(9),
    )
    close(
        got[some], expected(case.heads_q[some], case.weight, case.nope, case.pages, *tables, case.scale), torch.float32
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_absorbed_equals_expanded(dtype: torch.dtype, fp8: bool) -> None:
    """The last 23 tokens of one sequence, by either form and by the definition."""
    case = make_mla_case((23,), (61,), num_heads=6, rank=64, rope=16, nope=32, v=20, dtype=dtype, fp8=fp8)
    latent, rope_key = mla.mla_gather(case.pages, case.page_table[0], 61, case.scales, rank=64, dtype=dtype)
    kv = latent @ case.weight.T
    expanded = mla.mla_expanded_attention(case.heads_q, kv, rope_key, case.scale, nope=32)
    assert expanded.dtype == dtype
    rows = mla_reference.mla_gather(case.pages, case.page_table[0], 61, 64, case.scales)
    expected = mla_reference.expanded_attention(case.heads_q, *rows, case.weight, 32, case.scale)
    close(expanded, expected, dtype, 2)
    close(check_absorbed(case), expected, dtype, 2)


def test_bf16_is_as_accurate_as_the_expanded_form(form: str) -> None:
    """Against exact arithmetic on the same bf16 inputs, the absorbed form errs no more than keys and values in bf16 do."""
    if form != "cpu":
        pytest.skip("torch's own sums are not ours to judge")
    case = make_mla_case((8,), (300,), num_heads=8, rank=256, rope=32, nope=64, v=64, dtype=torch.bfloat16)
    rows = mla_reference.mla_gather(case.pages, case.page_table[0], 300, 256)
    arguments = (case.heads_q, *rows, case.weight, 64, case.scale)
    exact = mla_reference.expanded_attention(*arguments)
    model = mla_reference.expanded_attention(*arguments, kv_dtype=torch.bfloat16).bfloat16()
    absorbed = check_absorbed(case)
    assert (absorbed.double() - exact).square().mean() < 2 * (model.double() - exact).square().mean()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_store_and_gather(dtype: torch.dtype, fp8: bool) -> None:
    for rank, rope, page_size in ((16, 8, 1), (40, 7, 8), (512, 64, 16)):
        num_tokens, num_pages = 70, 80
        latent = (torch.randn(num_tokens, rank + 5) * torch.rand(num_tokens, 1) * 100).to(dtype)[:, :rank]
        rope_key = torch.randn(rope, num_tokens).to(dtype).T  # last dimension strided
        latent[7] = 0
        rope_key[9, 1] = float("nan")
        latent[11, 3] = float("inf")
        slots = torch.randperm(num_pages * page_size)[:num_tokens]
        slots[[3, 40]] = -1
        pages = [torch.full((num_pages, page_size, rank + rope), 9.0).to(FP8 if fp8 else dtype) for _ in range(2)]
        scales = [torch.full((num_pages, page_size, 2), 9.0) if fp8 else None for _ in range(2)]
        mla.mla_store(latent, rope_key, pages[0], slots, scales[0])
        mla_reference.mla_store(latent, rope_key, pages[1], slots, scales[1])
        torch.testing.assert_close(pages[0].float(), pages[1].float(), atol=0, rtol=0, equal_nan=True)
        if fp8:
            torch.testing.assert_close(scales[0], scales[1], atol=0, rtol=0, equal_nan=True)
        ids, length = torch.randperm(num_pages)[:9].int(), 9 * page_size - page_size // 2
        got = mla.mla_gather(pages[0], ids, length, scales[0], rank=rank, dtype=dtype)
        expected = mla_reference.mla_gather(pages[0], ids, length, rank, scales[0])
        for part, wanted in zip(got, expected):
            assert part.dtype == dtype
            torch.testing.assert_close(part, wanted.float().to(dtype), equal_nan=True)


def test_every_fp8_value_is_converted_as_torch_does() -> None:
    """All 256 bit patterns read, and their neighbourhoods rounded, with a scale of 1."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = every.float()[~every.float().isnan()]
    rows = torch.cat([finite, (finite[:-1] + finite[1:]) / 2, torch.randn(2000) * 100, torch.randn(2000) / 100])
    rows = rows.clamp(-448, 448).view(-1, 1).repeat(1, 9)
    rows[:, 8] = 448.0  # the largest magnitude: a scale of 1
    pages, scales = torch.empty(rows.shape[0], 1, 12).to(FP8), torch.empty(rows.shape[0], 1, 2)
    mla.mla_store(rows, rows[:, :3], pages, torch.arange(rows.shape[0]), scales)
    assert torch.equal(pages[:, 0, :9].float(), rows.to(FP8).float()) and (scales[:, :, 0] == 1).all()
    pages = every.view(-1, 1, 1).view(torch.uint8).repeat(1, 1, 20).view(FP8)
    tables = (
        torch.arange(256, dtype=torch.int32)[:, None],
        torch.ones(256, dtype=torch.int32),
        torch.arange(257).int(),
    )
    got = mla.mla_attention(torch.zeros(256, 1, 20), pages, *tables, 1.0, rank=17, scales=torch.ones(256, 1, 2))
    nan = every.float().isnan()
    assert torch.equal(got[~nan], every.float()[~nan, None, None].expand(-1, 1, 17))
    assert nan.sum() == 2 and (got.isnan().all(dim=2)[:, 0] == nan).all()


@pytest.mark.parametrize("packed", [True, False])
def test_update(packed: bool) -> None:
    for dtype in TOLERANCE:
        case = make_mla_case((2,), (20,), num_heads=3, dtype=dtype)
        weights = mla.AbsorbedWeights(case.weight, 3, case.nope, packed=packed)
        arguments = (case.pages, *case.tables, case.scale)
        address = weights.weight.data_ptr()
        assert weights.num_bytes == (case.weight.nbytes if packed else 0)
        assert (address == case.weight.data_ptr()) != packed
        other = make_mla_case((2,), (20,), num_heads=3, dtype=dtype, seed=1).weight
        before = mla.mla_absorbed_attention(case.heads_q, weights, *arguments)
        weights.update(other)
        fresh = mla.AbsorbedWeights(other, 3, case.nope)
        after = mla.mla_absorbed_attention(case.heads_q, weights, *arguments)
        assert torch.equal(after, mla.mla_absorbed_attention(case.heads_q, fresh, *arguments))
        assert not torch.equal(after, before)
        assert not packed or weights.weight.data_ptr() == address
        with pytest.raises(ValueError, match="expected a weight"):
            weights.update(other[:-1])


def test_empty_context_gives_zeros() -> None:
    case = make_mla_case((1, 1), (1, 9), num_heads=2)
    tables = (case.page_table, torch.tensor([0, 9], dtype=torch.int32), case.query_start_loc)
    out = mla.mla_attention(case.q, case.pages, *tables, case.scale, rank=case.rank)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all() and out[1].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_query_stays_nan_in_its_own_row(dtype: torch.dtype, form: str) -> None:
    """A broken row must show. (torch's own fused CPU attention answers some NaN rows with zeros.)"""
    if form != "cpu":
        pytest.skip("torch's")
    case = make_mla_case((1, 8), (9, 20), num_heads=2, rank=64, rope=32, dtype=dtype)
    case.q[0, 0] = float("nan")
    case.q[3, 1] = float("nan")
    assert attend(case).isnan().all(dim=2).nonzero().tolist() == [[0, 0], [3, 1]]


@pytest.mark.parametrize(("dtype", "num_heads"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 40)])
def test_growing_logits_rescale_the_sums(dtype: torch.dtype, num_heads: int) -> None:
    """Later keys beat earlier ones by far, tile after tile, and nothing overflows."""
    case = make_mla_case((2, 1), (700, 300), num_heads=num_heads, rank=32, rope=0, dtype=dtype)
    case.q.copy_(case.q.abs() * 10)
    growth = torch.arange(case.seq_lens.max()) / 100
    for i, length in enumerate(case.seq_lens.tolist()):
        position = torch.arange(length)
        pages, offsets = case.page_table[i, position // 16].long(), position % 16
        case.pages[pages, offsets] = case.pages[pages, offsets].abs() * growth[:length, None].to(dtype)
    rtol = 0 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend(case).double(), expected_of(case), atol=1e-3, rtol=rtol)


def test_results_do_not_depend_on_batch_mates(form: str) -> None:
    """Bit for bit on one thread: a request's tokens must not change with what runs beside it."""
    for dtype in TOLERANCE:
        both = make_mla_case((1, 13), (70, 45), num_heads=3, rank=64, rope=32, dtype=dtype)
        one = (both.page_table[:1], both.seq_lens[:1], torch.tensor([0, 1], dtype=torch.int32))
        alone = mla.mla_attention(both.q[:1], both.pages, *one, both.scale, rank=64)
        weights = mla.AbsorbedWeights(both.weight, 3, both.nope)
        together = mla.mla_absorbed_attention(both.heads_q, weights, both.pages, *both.tables, both.scale)
        out = mla.mla_absorbed_attention(both.heads_q[:1], weights, both.pages, *one, both.scale)
        if form == "cpu":
            assert torch.equal(attend(both)[:1], alone)
            assert torch.equal(together[:1], out)


def test_out_and_strides() -> None:
    case = make_mla_case(*MIXED, num_heads=4)
    wide = torch.full((case.q.shape[0], 6, 47), 3.0)
    out = wide[:, 1:5, :40]
    assert attend(case, out=out) is out
    close(out, expected_of(case), torch.float32)
    wide[:, 1:5, :40] = 3.0
    assert (wide == 3.0).all()  # nothing written beside it
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)  # last dimension strided
    again = mla.mla_attention(transposed, case.pages, *case.tables, case.scale, rank=40)
    close(again, expected_of(case), torch.float32)


def test_several_threads_at_once() -> None:
    cases = [make_mla_case((1, 9), (200, 60 + i), num_heads=2, dtype=torch.bfloat16, seed=i) for i in range(4)]
    expected = [attend(case) for case in cases]
    wrong: list[int] = []

    def worker(i: int) -> None:
        for _ in range(20):
            if not torch.equal(attend(cases[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bad_arguments_are_refused() -> None:
    case = make_mla_case((1,), (9,), num_heads=2)
    q, pages, tables = case.q, case.pages, case.tables
    for arguments in (
        (q[:, :, :30], pages, *tables),
        (q.bfloat16(), pages, *tables),
        (q.double(), pages.double(), *tables),
        (q, pages.transpose(0, 1), *tables),
        (q, pages.to(FP8), *tables),
        (q, pages, tables[0].long(), *tables[1:]),
        (q, pages, *tables[:2], tables[2][:1]),
    ):
        with pytest.raises(ValueError, match=r"must be|takes"):
            mla.mla_attention(*arguments, case.scale, rank=case.rank)
    for bad in ({"rank": 49}, {"rank": 0}, {"rank": 40, "scales": torch.ones(3, 16, 2)}):
        with pytest.raises(ValueError, match="must be"):
            mla.mla_attention(q, pages, *tables, case.scale, **bad)
    with pytest.raises(ValueError, match="scales must be"):
        mla.mla_attention(q, pages.to(FP8), *tables, case.scale, rank=40, scales=torch.ones(3, 16))
    with pytest.raises(ValueError, match="out must be"):
        attend(case, out=torch.zeros(1, 2, 41))
    slots = torch.zeros(1, dtype=torch.int64)
    for latent, rope_key, where in (
        (q[:, 0, :40], q[:, 0, 41:], slots),
        (q[:, 0, :40], q[:, 0, 40:].half(), slots),
        (q[:, 0, :40], q[:, 0, 40:], slots.int()),
    ):
        with pytest.raises(ValueError, match="must"):
            mla.mla_store(latent, rope_key, pages, where)
    with pytest.raises(ValueError, match="dtype"):
        mla.mla_gather(pages.to(FP8), tables[0][0], 3, torch.ones(3, 16, 2), rank=40)
    with pytest.raises(ValueError, match="page_ids"):
        mla.mla_gather(pages, tables[0][0], 90, rank=40)
    weights = mla.AbsorbedWeights(case.weight, 2, case.nope)
    with pytest.raises(ValueError, match="q must be"):
        mla.mla_absorbed_attention(case.heads_q[:, :, 1:], weights, pages, *tables, case.scale)
    with pytest.raises(ValueError, match="weight must"):
        mla.AbsorbedWeights(case.weight, 3, case.nope)
    with pytest.raises(ValueError, match="leave no values"):
        mla.AbsorbedWeights(case.weight, 2, 40)
    with pytest.raises(ValueError, match="must be"):
        mla.mla_expanded_attention(case.heads_q, torch.zeros(9, 80), torch.zeros(9, 9), 1.0, nope=24)
    with pytest.raises(ValueError, match="must hold"):
        mla.mla_expanded_attention(case.heads_q, torch.zeros(9, 48), torch.zeros(9, 8), 1.0, nope=24)


def test_long_chunks_prefer_the_expanded_form() -> None:
    for heads in (16, 128):
        for prefix in (0, 10, 1000, 100_000):
            choice = [mla.prefer_expanded(new, prefix + new, heads) for new in range(1, 2000)]
            assert choice == sorted(choice)  # once it pays, it pays for longer chunks
            assert not choice[0] and choice[-1]
