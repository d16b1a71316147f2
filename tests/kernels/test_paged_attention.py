"""The fast forms of paged attention and of the KV store against the oracle, on fresh random odd shapes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch

from hf_accel_kernels import ops, reference, torch_attention
from hf_accel_kernels.cpu.attention import CpuAttention
from hf_accel_kernels.testing import PagedCase, make_paged_case

# Largest absolute difference allowed; outputs are averages of standard normals. bf16 and fp16: rounding of p and out.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MIXED = [(1, 1, 7, 0, 1, 33), (97, 1, 40, 5, 18, 33)]  # query_lens, seq_lens: decode, prefill chunks, an idle row


def attend_cpu(case: PagedCase, **options: object) -> torch.Tensor:
    return ops.paged_attention(*case.arguments(), case.scale, **options)


def attend_torch(case: PagedCase, **options: object) -> torch.Tensor:
    q, k_pages, v_pages, page_table, seq_lens, _ = case.arguments()
    lens = (case.query_lens_cpu, case.seq_lens_cpu)
    return torch_attention.paged_attention(q, k_pages, v_pages, page_table, seq_lens, *lens, case.scale, **options)


FORMS = pytest.mark.parametrize("attend", [attend_cpu, attend_torch])


def check(attend: Callable[..., torch.Tensor], case: PagedCase, **options: object) -> None:
    expected = reference.paged_attention(*case.arguments(), case.scale, **options)
    torch.testing.assert_close(attend(case, **options), expected, atol=TOLERANCE[case.q.dtype], rtol=0)


@pytest.fixture(autouse=True)
def _cpp_op_is_there() -> None:
    CpuAttention()  # ops would fall back silently, and the comparison would test the torch form twice


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [17, 40, 64, 80, 96, 128, 256])
def test_head_dims(attend: Callable[..., torch.Tensor], dtype: torch.dtype, head_dim: int) -> None:
    check(attend, make_paged_case(*MIXED, num_kv_heads=2, group=3, head_dim=head_dim, dtype=dtype, seed=head_dim))


@FORMS
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_sizes(attend: Callable[..., torch.Tensor], group: int, dtype: torch.dtype) -> None:
    check(attend, make_paged_case(*MIXED, num_kv_heads=2, group=group, head_dim=64, dtype=dtype, seed=group))


@FORMS
@pytest.mark.parametrize("page_size", [1, 5, 8, 16, 32])
def test_page_sizes(attend: Callable[..., torch.Tensor], page_size: int) -> None:
    check(attend, make_paged_case(*MIXED, num_kv_heads=1, group=2, head_dim=48, page_size=page_size, seed=page_size))


@FORMS
@pytest.mark.parametrize("dims", [(64, 40), (40, 96), (24, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_dim_differs(attend: Callable[..., torch.Tensor], dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = make_paged_case(*MIXED, num_kv_heads=2, group=2, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype)
    check(attend, case)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("sliding_window", "softcap"), [(1, 0.0), (7, 0.0), (64, 0.0), (0, 2.5), (19, 30.0), (0, 0.0)])
def test_window_softcap_sinks(
    attend: Callable[..., torch.Tensor], dtype: torch.dtype, sinks: bool, sliding_window: int, softcap: float
) -> None:
    case = make_paged_case(*MIXED, num_kv_heads=2, group=3, head_dim=64, dtype=dtype, seed=sliding_window)
    options = {"sliding_window": sliding_window, "softcap": softcap, "sinks": case.sinks if sinks else None}
    check(attend, case, **options)


@FORMS
def test_long_prefill_with_prefix_crosses_every_tile(attend: Callable[..., torch.Tensor]) -> None:
    case = make_paged_case((150, 290), (150, 333), num_kv_heads=1, group=2, head_dim=32)
    check(attend, case)
    check(attend, case, sliding_window=140)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("sinks", [False, True])
def test_threads_and_split_keys(num_threads: int, sinks: bool) -> None:
    """One long sequence and one kv head: with two threads the keys are split and the parts merged."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        for query_len, seq_len in ((1, 1500), (3, 1100), (40, 1025)):
            case = make_paged_case((query_len,), (seq_len,), num_kv_heads=1, group=4, head_dim=40)
            check(attend_cpu, case, sinks=case.sinks if sinks else None)
            check(attend_cpu, case, sliding_window=700)
    finally:
        torch.set_num_threads(before)


def test_random_batches() -> None:
    rng = random.Random()  # fresh every run; the message carries what is needed to repeat it
    for _ in range(25):
        seed = rng.randrange(1 << 30)
        pick = random.Random(seed)
        query_lens = [pick.choice([0, 1, 1, pick.randint(2, 30)]) for _ in range(pick.randint(1, 4))] + [1]
        seq_lens = [n + pick.choice([0, pick.randint(0, 120)]) for n in query_lens]
        case = make_paged_case(
            query_lens,
            seq_lens,
            num_kv_heads=pick.randint(1, 3),
            group=pick.randint(1, 9),
            head_dim=pick.randint(1, 140),
            v_head_dim=pick.randint(1, 140),
            page_size=pick.randint(1, 20),
            dtype=pick.choice(list(TOLERANCE)),
            seed=seed,
        )
        options = {"sliding_window": pick.choice([0, pick.randint(1, 50)]), "softcap": pick.choice([0.0, 15.0])}
        for attend in (attend_cpu, attend_torch):
            try:
                check(attend, case, **options)
            except AssertionError as error:
                raise AssertionError(f"{attend.__name__}, seed {seed}: {error}") from error


@FORMS
def test_empty_context_gives_zeros(attend: Callable[..., torch.Tensor]) -> None:
    case = make_paged_case((1, 1), (1, 9), num_kv_heads=2, group=2, head_dim=32)
    idle = torch.tensor([0, 9], dtype=torch.int32)
    q, k_pages, v_pages, page_table, _, starts = case.arguments()
    if attend is attend_cpu:
        out = ops.paged_attention(q, k_pages, v_pages, page_table, idle, starts, case.scale)
    else:
        out = torch_attention.paged_attention(q, k_pages, v_pages, page_table, idle, (1, 1), (0, 9), case.scale)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all() and out[1].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_query_stays_nan_in_its_own_row(dtype: torch.dtype) -> None:
    """A broken row must show. (torch's own fused CPU attention answers some NaN rows with zeros.)"""
    case = make_paged_case((1, 8), (9, 20), num_kv_heads=1, group=2, head_dim=64, dtype=dtype)
    case.q[0, 0] = float("nan")
    case.q[3, 1] = float("nan")
    bad = attend_cpu(case).isnan().all(dim=2)  # [num_tokens, num_heads]
    assert bad.nonzero().tolist() == [[0, 0], [3, 1]]


def test_extreme_logits_do_not_overflow() -> None:
    case = make_paged_case((5, 1), (30, 300), num_kv_heads=1, group=2, head_dim=64)
    case.q.mul_(1e3)
    expected = reference.paged_attention(*case.arguments(), case.scale)
    torch.testing.assert_close(attend_cpu(case), expected, atol=1e-3, rtol=0)  # fp32 logits of 1e4 have an ulp of 1e-3


def test_results_do_not_depend_on_batch_mates() -> None:
    """Bit for bit on one thread: a request's tokens must not change with what runs beside it."""
    for dtype in TOLERANCE:
        both = make_paged_case((1, 13), (70, 45), num_kv_heads=2, group=3, head_dim=64, dtype=dtype)
        q, k_pages, v_pages, page_table, seq_lens, _ = both.arguments()
        together = attend_cpu(both)
        starts = torch.tensor([0, 1], dtype=torch.int32)
        alone = ops.paged_attention(q[:1], k_pages, v_pages, page_table[:1], seq_lens[:1], starts, both.scale)
        assert torch.equal(together[:1], alone)


def test_out_and_strides() -> None:
    case = make_paged_case(*MIXED, num_kv_heads=2, group=2, head_dim=33)
    assert not case.q.is_contiguous()
    wide = torch.full((case.q.shape[0], 6, 40), 3.0)
    out = wide[:, 1:5, :33]
    assert ops.paged_attention(*case.arguments(), case.scale, out=out) is out
    expected = reference.paged_attention(*case.arguments(), case.scale)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    wide[:, 1:5, :33] = 3.0
    assert (wide == 3.0).all()  # nothing written beside it
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)  # last dimension strided
    again = ops.paged_attention(transposed, *case.arguments()[1:], case.scale)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def test_several_threads_at_once() -> None:
    cases = [make_paged_case((1, 9), (200, 60 + i), num_kv_heads=1, group=2, head_dim=64, seed=i) for i in range(4)]
    expected = [attend_cpu(case) for case in cases]
    wrong: list[int] = []

    def worker(i: int) -> None:
        for _ in range(40):
            if not torch.equal(attend_cpu(cases[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("store", [ops.store_kv, torch_attention.store_kv], ids=["cpu", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_store_kv(store: Callable[..., None], dtype: torch.dtype) -> None:
    num_tokens, num_kv_heads, page_size = 70, 3, 8
    k = torch.randn(num_tokens, num_kv_heads + 1, 20).to(dtype)[:, :num_kv_heads, :17]
    v = torch.randn(num_tokens, 11, num_kv_heads).to(dtype).transpose(1, 2)  # last dimension strided
    slots = torch.randperm(15 * page_size)[:num_tokens]
    slots[[3, 40]] = -1
    pages = [torch.full((15, num_kv_heads, page_size, d), 9.0, dtype=dtype) for d in (17, 11, 17, 11)]
    store(k, v, pages[0], pages[1], slots)
    reference.store_kv(k, v, pages[2], pages[3], slots)
    assert torch.equal(pages[0], pages[2]) and torch.equal(pages[1], pages[3])


def test_bad_arguments_are_refused() -> None:
    case = make_paged_case((1,), (9,), num_kv_heads=2, group=2, head_dim=32)
    q, k_pages, v_pages, page_table, seq_lens, starts = case.arguments()
    bad = [
        (q[:, :3], k_pages, v_pages, page_table, seq_lens, starts),
        (q.bfloat16(), k_pages, v_pages, page_table, seq_lens, starts),
        (q[:, :, :30], k_pages, v_pages, page_table, seq_lens, starts),
        (q, k_pages[:, :1], v_pages, page_table, seq_lens, starts),
        (q, k_pages.transpose(1, 2), v_pages.transpose(1, 2), page_table, seq_lens, starts),
        (q, k_pages, v_pages, page_table.long(), seq_lens, starts),
        (q, k_pages, v_pages, page_table, seq_lens, starts[:1]),
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match="must be"):
            ops.paged_attention(*arguments, case.scale)
    with pytest.raises(ValueError, match="sinks"):
        ops.paged_attention(*case.arguments(), case.scale, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="out must"):
        ops.paged_attention(*case.arguments(), case.scale, out=torch.zeros(1, 4, 31))
    with pytest.raises(ValueError, match="must be"):
        ops.store_kv(case.k, case.v, k_pages, v_pages, torch.zeros(2, dtype=torch.int64))
