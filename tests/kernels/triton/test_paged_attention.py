"""The paged attention kernels against the oracle, on fresh random odd shapes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from hf_accel_kernels import ops, reference, torch_attention
from hf_accel_kernels.testing import PagedCase, make_paged_case, quantized
from hf_accel_kernels.triton_ops import paged_decode, paged_prefill, paged_tiles
from hf_accel_kernels.triton_ops.paged_attention import paged_attention

# Largest absolute difference allowed; outputs are averages of standard normals. bf16 and fp16: rounding of p and out.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LSE_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def attend(case: PagedCase, *, decode: int = 0, max_seq_len: int | None = None, **options: Any) -> torch.Tensor:
    """The kernels' result; `decode` leading rows go to the decode kernel."""
    out = torch.full((*case.q.shape[:2], case.v_pages.shape[3]), 7.0, dtype=case.q.dtype, device=case.q.device)
    arguments = {"sliding_window": 0, "softcap": 0.0, "sinks": None, "out_lse": None} | options
    paged_attention(
        *case.arguments(),
        arguments.pop("scale", case.scale),
        k_scales=case.k_scales,
        v_scales=case.v_scales,
        num_decode_rows=decode,
        max_query_len=max(case.query_lens_cpu),
        max_seq_len=max_seq_len,
        out=out,
        **arguments,
    )
    return out


def expect(case: PagedCase, **options: Any) -> torch.Tensor:
    scale = options.pop("scale", case.scale)
    return reference.paged_attention(
        *case.arguments(), scale, k_scales=case.k_scales, v_scales=case.v_scales, **options
    )


def check(case: PagedCase, *, decode: int = 0, max_seq_len: int | None = None, **options: Any) -> None:
    lse = torch.full(case.q.shape[:2], 7.0, device=case.q.device)
    expected_lse = torch.empty_like(lse)
    expected = expect(case, out_lse=expected_lse, **options)
    result = attend(case, decode=decode, max_seq_len=max_seq_len, out_lse=lse, **options)
    torch.testing.assert_close(result, expected, atol=TOLERANCE[case.q.dtype], rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=LSE_TOLERANCE[case.q.dtype], rtol=1e-6)


@DTYPES
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 40), (192, 128), (24, 130), (256, 256)], ids=str)
def test_head_dims(dtype: torch.dtype, dims: tuple[int, int], device: torch.device) -> None:
    case = make_paged_case(
        (1, 1, 9, 1), (70, 3, 25, 33), num_kv_heads=1, group=3, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype, device=device
    )  # fmt: skip
    check(case, decode=2)


@pytest.mark.parametrize("page_size", [1, 5, 16, 48, 64, 256])
def test_page_sizes(page_size: int, device: torch.device) -> None:
    lens = ((1, 1, 40), (150, 20, 90))
    case = make_paged_case(*lens, num_kv_heads=1, group=2, head_dim=48, page_size=page_size, device=device)
    check(case, decode=2)
    check(case, sliding_window=70)


@pytest.mark.parametrize("group", [1, 7, 16, 71])
def test_group_sizes(group: int, device: torch.device) -> None:
    """More heads than a tile has rows are cut into several; rows of one token may lie in two tiles."""
    case = make_paged_case((1, 1, 5), (30, 9, 40), num_kv_heads=1, group=group, head_dim=32, device=device)
    check(case, decode=2, sinks=case.sinks)


@DTYPES
@pytest.mark.parametrize(
    "options",
    [{"sliding_window": 1}, {"sliding_window": 19, "softcap": 30.0}, {"softcap": 2.5}, {"sliding_window": 150}],
    ids=str,
)
def test_window_and_softcap(dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    """Chunks longer than a tile: tiles left of the window, wholly inside, on the diagonal."""
    case = make_paged_case((1, 1, 170), (230, 4, 230), num_kv_heads=1, group=2, head_dim=64, dtype=dtype, device=device)
    check(case, decode=2, sinks=case.sinks, **options)


@pytest.mark.parametrize(("fp8", "sliding_window", "sinks"), [(False, 0, True), (True, 0, False), (False, 300, True)])
def test_splits(fp8: bool, sliding_window: int, sinks: bool, device: torch.device) -> None:
    """Long and short sequences, an idle one, in one launch whose grid has room for more splits than any has."""
    case = make_paged_case((1, 1, 1, 1), (900, 131, 1, 420), num_kv_heads=1, group=2, head_dim=40, device=device)
    case = quantized(case) if fp8 else case
    case = dataclasses.replace(
        case, seq_lens=case.seq_lens * torch.tensor([1, 1, 0, 1], device=device, dtype=torch.int32)
    )
    for longest in (900, None):
        options = {"sliding_window": sliding_window, "sinks": case.sinks if sinks else None}
        check(case, decode=4, max_seq_len=longest, **options)


def test_splits_are_bounded_by_places(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A busy device splits less; the splits a sequence may have bound the long one."""
    case = make_paged_case((1,) * 3, (700, 40, 300), num_kv_heads=2, group=1, head_dim=24, device=device)
    for places in (1, 6, 40):
        monkeypatch.setattr(paged_decode, "num_processors", lambda device, places=places: places)
        monkeypatch.setattr(paged_decode, "RESIDENT", 1)
        check(case, decode=3)


def test_more_splits_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(paged_decode, "SHORTEST_SPLIT", 64)
    case = make_paged_case((1, 1), (2400, 70), num_kv_heads=1, group=2, head_dim=16, device=device)
    check(case, decode=2, sinks=case.sinks)


@DTYPES
@pytest.mark.parametrize("chip", [80, 90])
def test_fp8(dtype: torch.dtype, chip: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(paged_tiles, "capability", lambda device: chip)
    case = make_paged_case((1, 1, 40), (100, 30, 90), num_kv_heads=2, group=2, head_dim=40, dtype=dtype, device=device)
    case = quantized(case)
    check(case, decode=2, softcap=20.0)
    check(case, sliding_window=33)


def test_every_fp8_value(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Values of one key each, so that results are the stored values themselves."""
    case = make_paged_case((1,), (1,), num_kv_heads=1, group=1, head_dim=16, v_head_dim=256, page_size=1, device=device)
    stored = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    stored = torch.where(stored.float().isnan(), 0.0, stored.float()).to(torch.float8_e4m3fn)
    ones = torch.ones(case.k_pages.shape[:3], device=device)
    v_pages = stored.view(torch.uint8).expand(case.v_pages.shape).contiguous().view(torch.float8_e4m3fn)
    k_pages = torch.zeros_like(case.k_pages).to(torch.float8_e4m3fn)
    case = dataclasses.replace(case, k_pages=k_pages, v_pages=v_pages, k_scales=ones, v_scales=ones)
    for chip in (80, 90):
        if device.type == "cpu":
            monkeypatch.setattr(paged_tiles, "capability", lambda device, chip=chip: chip)
        for decode in (0, 1):
            assert torch.equal(attend(case, decode=decode)[0, 0], stored.float())


def test_more_sequences_than_are_searched_at_once(device: torch.device) -> None:
    query_lens = [2 if i % 50 == 7 else 1 for i in range(140)]
    seq_lens = [n + i % 5 for i, n in enumerate(query_lens)]
    check(make_paged_case(query_lens, seq_lens, num_kv_heads=1, group=1, head_dim=16, device=device), decode=7)


def test_rows_that_see_nothing_and_rows_before_the_context(device: torch.device) -> None:
    case = make_paged_case((1, 9, 3, 0), (5, 9, 3, 2), num_kv_heads=1, group=2, head_dim=32, device=device)
    short = torch.tensor([0, 4, 0, 2], dtype=torch.int32, device=device)
    case = dataclasses.replace(case, seq_lens=short)
    for sinks in (None, case.sinks):
        check(case, decode=1, sinks=sinks)
        check(case, sinks=sinks)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float, device: torch.device) -> None:
    case = make_paged_case((1, 5), (40, 20), num_kv_heads=1, group=2, head_dim=32, device=device)
    check(case, decode=1, scale=scale)
    check(case, decode=1, scale=scale, softcap=5.0)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@DTYPES
def test_nan_query_stays_nan_in_its_own_row(dtype: torch.dtype, device: torch.device) -> None:
    case = make_paged_case((1, 8), (200, 20), num_kv_heads=1, group=2, head_dim=64, dtype=dtype, device=device)
    case.q[0, 0] = float("nan")
    case.q[3, 1] = float("nan")
    bad = attend(case, decode=1).isnan().all(dim=2)
    assert bad.nonzero().tolist() == [[0, 0], [3, 1]]


def test_random_batches(device: torch.device) -> None:
    rng = random.Random()  # fresh every run; the message carries what is needed to repeat it
    for _ in range(14):
        seed = rng.randrange(1 << 30)
        pick = random.Random(seed)
        decode = pick.randint(0, 3)
        query_lens = [1] * decode + [pick.choice([0, 1, pick.randint(2, 60)]) for _ in range(pick.randint(0, 3))] + [1]
        seq_lens = [n + pick.choice([0, pick.randint(0, 200)]) for n in query_lens]
        case = make_paged_case(
            query_lens,
            seq_lens,
            num_kv_heads=pick.randint(1, 2),
            group=pick.randint(1, 9),
            head_dim=pick.randint(1, 140),
            v_head_dim=pick.randint(1, 140),
            page_size=pick.choice([1, 3, 16, 17, 32, 64, 128]),
            dtype=pick.choice(list(TOLERANCE)),
            device=device,
            seed=seed,
        )
        case = quantized(case) if pick.random() < 0.3 else case
        options = {"sliding_window": pick.choice([0, pick.randint(1, 90)]), "softcap": pick.choice([0.0, 15.0])}
        try:
            check(case, decode=decode, sinks=pick.choice([None, case.sinks]), **options)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("table", ["CONFIGS", "SMALL_CONFIGS", "MIDDLE_CONFIGS", "WIDE_CONFIGS"])
def test_every_width_has_a_config(table: str) -> None:
    tables = getattr(paged_prefill, table)
    for widths in tables.values() if table == "CONFIGS" else [tables]:
        assert list(widths) == [64, 128, 256, 512]


def test_contract_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """`ops.paged_attention` as it dispatches on CUDA, any strides."""
    monkeypatch.setattr(ops, "why_not", lambda device: "")
    case = make_paged_case((1, 1, 6), (40, 3, 11), num_kv_heads=2, group=2, head_dim=33, device=device)
    expected = expect(case)
    wide = torch.full((case.q.shape[0], 6, 40), 3.0, device=device)
    out = wide[:, 1:5, :33]
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    result = ops.paged_attention(transposed, *case.arguments()[1:], case.scale, out=out, num_decode_rows=2)
    assert result is out
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    out.fill_(3.0)
    assert (wide == 3.0).all()  # nothing written beside it
    torch.testing.assert_close(ops.paged_attention(*case.arguments(), case.scale), expected, atol=1e-5, rtol=0)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "sliding_window": 9}], ids=str)
def test_torch_form_reads_fp8_and_writes_lse(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = quantized(make_paged_case((1, 7, 0, 3), (97, 40, 5, 3), num_kv_heads=2, group=3, head_dim=40, dtype=dtype))
    lse, expected_lse = torch.empty(case.q.shape[:2]), torch.empty(case.q.shape[:2])
    for sinks in (None, case.sinks):
        keywords = {**options, "sinks": sinks, "k_scales": case.k_scales, "v_scales": case.v_scales}
        result = ops.paged_attention(*case.arguments(), case.scale, out_lse=lse, **keywords)
        expected = expect(case, out_lse=expected_lse, sinks=sinks, **options)
        torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=0)
        # keys are rounded to q's dtype before the product
        torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE[dtype] * 2, rtol=1e-2)
        plain = ops.paged_attention(*case.arguments(), case.scale, **keywords)
        torch.testing.assert_close(plain, expected, atol=TOLERANCE[dtype], rtol=0)


def test_torch_decode_batch_reads_fp8_and_writes_lse() -> None:
    case = quantized(make_paged_case((1, 1, 1), (40, 3, 17), num_kv_heads=2, group=3, head_dim=32))
    out, lse, expected_lse = torch.empty(case.q.shape), torch.empty(case.q.shape[:2]), torch.empty(case.q.shape[:2])
    options = torch_attention.Options(case.scale, 9, 0.0, case.sinks, case.k_scales, case.v_scales)
    rows = ([0, 1, 2], [0, 1, 2, 3], case.seq_lens_cpu)
    torch_attention._attend_decode_batch(*case.arguments()[:5], *rows, options, out, lse)
    expected = expect(case, sliding_window=9, sinks=case.sinks, out_lse=expected_lse)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-6)


def test_bad_scales_and_lse_are_refused() -> None:
    case = make_paged_case((1,), (9,), num_kv_heads=2, group=1, head_dim=8)
    fp8 = quantized(case)
    with pytest.raises(ValueError, match="k_scales and v_scales"):
        ops.paged_attention(*fp8.arguments(), case.scale)
    with pytest.raises(ValueError, match="k_scales and v_scales"):
        ops.paged_attention(*case.arguments(), case.scale, k_scales=fp8.k_scales, v_scales=fp8.v_scales)
    with pytest.raises(ValueError, match="scales must be"):
        ops.paged_attention(*fp8.arguments(), case.scale, k_scales=fp8.k_scales[:1], v_scales=fp8.v_scales)
    with pytest.raises(ValueError, match="out_lse must be"):
        ops.paged_attention(*case.arguments(), case.scale, out_lse=torch.empty(1, 1))
