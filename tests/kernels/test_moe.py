"""Routed experts against float64 and against transformers' own functions, on odd shapes, every type and instruction set."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_accel_kernels import moe
from hf_accel_kernels.cpu import library
from hf_accel_kernels.moe import ACTIVATIONS, MATRIX_TOKENS, moe_experts
from hf_accel_kernels.moe_reference import moe_experts_reference

needs_library = pytest.mark.skipif(library.load()[0] is None, reason=f"no CPU ops: {library.load()[1]}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}


def make_case(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype,
    ids_to: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """hidden, expert_ids (repeats within a row happen), expert_weights, gate_up, down; ids below `ids_to`."""
    return (
        torch.randn(num_tokens, hidden).to(dtype),
        torch.randint(0, num_experts if ids_to is None else ids_to, (num_tokens, top_k)),
        torch.rand(num_tokens, top_k),
        (torch.randn(num_experts, 2 * inter, hidden) * 1.5 * hidden**-0.5).to(dtype),
        (torch.randn(num_experts, hidden, inter) * inter**-0.5).to(dtype),
    )


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and out.shape == expected.shape
    error = relative_error(out, expected)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_matches_float64(seed: int, dtype: torch.dtype, threads) -> None:
    draw = random.Random(seed)
    shape = [draw.randint(*limits) for limits in ((1, 70), (1, 64), (1, 8), (1, 150), (1, 150))]
    torch.manual_seed(seed)
    case = make_case(*shape, dtype, ids_to=shape[1] + seed % 3)  # two thirds of the seeds have experts held elsewhere
    expected = moe_experts_reference(*case)
    one = moe_experts(*case)
    assert_close(one, expected, dtype)
    threads(2)
    two = moe_experts(*case)
    assert_close(two, expected, dtype)
    assert library.load()[0] is None or torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 15, 16, 17, 33, 48, 97, 200])
@pytest.mark.parametrize(("hidden", "inter"), [(64, 128), (33, 31), (130, 80), (1030, 65), (31, 1100)])
def test_many_tokens_of_few_experts(num_tokens: int, hidden: int, inter: int, dtype: torch.dtype) -> None:
    case = make_case(num_tokens, 2, 1, hidden, inter, dtype)
    assert_close(moe_experts(*case), moe_experts_reference(*case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("num_tokens", [2, 23])
def test_activations(activation: str, num_tokens: int, dtype: torch.dtype) -> None:
    case = make_case(num_tokens, 3, 2, 50, 37, dtype)
    case[0].mul_(3)
    expected = moe_experts_reference(*case, activation=activation)
    assert_close(moe_experts(*case, activation=activation), expected, dtype)


@needs_library
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_extreme_gates_stay_finite(activation: str) -> None:
    x = torch.tensor([[-200.0], [-90.0], [-5.0], [0.0], [90.0], [200.0]])
    ids, weights = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)
    gate_up = torch.tensor([1.0, 0.5]).view(1, 2, 1)
    out = moe_experts(x, ids, weights, gate_up, torch.ones(1, 1, 1), activation=activation)
    exact = ACTIVATIONS[activation](x.double()) * x.double() / 2
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [2, 40])
def test_experts_not_chosen_are_not_read(num_tokens: int, dtype: torch.dtype) -> None:
    x, ids, weights, gate_up, down = make_case(num_tokens, 9, 3, 45, 39, dtype)
    ids = torch.tensor([1, 4, 7])[torch.randint(0, 3, ids.shape)]
    expected = moe_experts_reference(x, ids, weights, gate_up, down)
    for expert in (0, 2, 3, 5, 6, 8):
        gate_up[expert], down[expert] = torch.nan, torch.nan
    assert_close(moe_experts(x, ids, weights, gate_up, down), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6, 40])
def test_a_bad_weight_row_spoils_its_column_alone(num_tokens: int, dtype: torch.dtype) -> None:
    x, ids, weights, gate_up, down = make_case(num_tokens, 1, 1, 70, 45, dtype)
    expected = moe_experts_reference(x, ids, weights, gate_up, down)
    down[0, 17] = torch.nan
    out = moe_experts(x, ids, weights, gate_up, down)
    rest = [c for c in range(70) if c != 17]
    assert out[:, 17].isnan().all()
    assert_close(out[:, rest], expected[:, rest], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 50])
def test_experts_held_elsewhere_add_nothing(num_tokens: int, dtype: torch.dtype) -> None:
    case = make_case(num_tokens, 4, 3, 40, 24, dtype, ids_to=6)
    case[1][0] = torch.tensor([4, 1 << 40, 5])
    case[2][case[1] >= 4] = torch.nan
    out = moe_experts(*case)
    assert not out[0].any()
    case[2][case[1] >= 4] = 0.0
    assert_close(out, moe_experts_reference(*case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [5, 37])
def test_strided_arguments(num_tokens: int, dtype: torch.dtype) -> None:
    x, ids, weights, gate_up, down = make_case(num_tokens, 5, 2, 60, 28, dtype)
    expected = moe_experts(x, ids, weights, gate_up, down)

    def check(*args: torch.Tensor) -> None:
        out = moe_experts(*args)
        assert_close(out, expected, dtype)
        assert library.load()[0] is None or torch.equal(out, expected)

    wide = torch.randn(num_tokens, 90).to(dtype)
    wide[:, 7:67] = x
    check(wide[:, 7:67], ids, weights, gate_up, down)
    columns = [t.t().contiguous().t() for t in (x, ids, weights)]
    check(*columns, gate_up, down)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (gate_up, down)]
    check(x, ids, weights, *turned)


@needs_library
def test_float32_rows_do_not_depend_on_batch_mates() -> None:
    x, ids, weights, gate_up, down = make_case(61, 3, 2, 1100, 70, torch.float32)
    whole = moe_experts(x, ids, weights, gate_up, down)
    for row in range(61):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], moe_experts(x[one], ids[one], weights[one], gate_up, down))


@pytest.mark.parametrize("weights_in_dtype", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 64])
def test_rounds_as_transformers_does(num_tokens: int, dtype: torch.dtype, weights_in_dtype: bool) -> None:
    config = Qwen3MoeConfig(num_experts=6, hidden_size=72, moe_intermediate_size=56)
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    x, _, weights, gate_up, down = make_case(num_tokens, 6, 3, 72, 56, dtype)
    experts.gate_up_proj.copy_(gate_up)
    experts.down_proj.copy_(down)
    ids = torch.rand(num_tokens, 6).topk(3).indices
    weights = weights.to(dtype) if weights_in_dtype else weights
    out = moe_experts(x, ids, weights, gate_up, down)
    exact = moe_experts_reference(x, ids, weights, gate_up, down)
    for function in (grouped_mm_experts_forward, batched_mm_experts_forward):
        theirs = function(experts, x, ids, weights)
        # A sum that ends a little elsewhere may round the other way, no more.
        assert relative_error(out, theirs) < TOLERANCE[dtype] / 2
        assert relative_error(out, exact) < 1.1 * relative_error(theirs, exact) + TOLERANCE[dtype] / 20
    eager = experts(x, ids, weights)  # adds up in the type of hidden
    assert relative_error(out, eager) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_run_as_matrix_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, by_expert = [], moe._by_expert
    monkeypatch.setattr(moe, "_by_expert", lambda *args: calls.append(1) or by_expert(*args))
    cpu = moe._cpu_ops()
    few, many = MATRIX_TOKENS[dtype] - 1, MATRIX_TOKENS[dtype]
    for num_tokens, expected_calls in ((few, 0 if cpu else 1), (many, 1)):
        case = make_case(num_tokens, 2, 2, 20, 12, dtype)
        calls.clear()
        assert_close(moe_experts(*case), moe_experts_reference(*case), dtype)
        has_tiles = dtype is torch.bfloat16 and cpu is not None and cpu.tile_tokens > 0
        assert len(calls) == (0 if has_tiles else expected_calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_form(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "_cpu_ops", lambda: None)
    case = make_case(31, 7, 3, 41, 29, dtype, ids_to=9)
    assert_close(moe_experts(*case), moe_experts_reference(*case), dtype)
    case[1][2, 1] = -1
    with pytest.raises(ValueError, match="negative"):
        moe_experts(*case)


def test_nothing_to_do() -> None:
    x, ids, weights, gate_up, down = make_case(3, 4, 2, 20, 12, torch.float32)
    assert moe_experts(x[:0], ids[:0], weights[:0], gate_up, down).shape == (0, 20)
    assert not moe_experts(x, ids[:, :0], weights[:, :0], gate_up, down).any()


def test_bad_arguments_are_refused() -> None:
    x, ids, weights, gate_up, down = make_case(3, 4, 2, 20, 12, torch.float32)
    for message, args in {
        "do not fit": (x[:, :19], ids, weights, gate_up, down),
        "gate_up": (x, ids, weights, gate_up[:, 1:], down),
        r"hidden must be": (x[0], ids, weights, gate_up, down),
        "expert_weights": (x, ids, weights[:, :1], gate_up, down),
        "for 3 tokens": (x, ids[:2], weights[:2], gate_up, down),
        "int64": (x, ids.int(), weights, gate_up, down),
        "floating": (x, ids, weights.int(), gate_up, down),
        "share": (x.bfloat16(), ids, weights, gate_up, down),
        "negative": (x, ids - 4, weights, gate_up, down),
        "one device": (x, ids, weights, gate_up, down.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            moe_experts(*args)
    with pytest.raises(ValueError, match="activation must be one of silu"):
        moe_experts(x, ids, weights, gate_up, down, activation="swish")
