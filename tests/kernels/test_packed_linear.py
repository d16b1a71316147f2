"""Packed linears against float64 matrix products on odd shapes, on every instruction set this machine has."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from hf_accel_kernels.cpu import library
from hf_accel_kernels.cpu.abi import fused_library
from hf_accel_kernels.fused_reference import linear_reference
from hf_accel_kernels.packed import PackedLinear, pack, packed_linear

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no CPU ops: {library.load()[1]}")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def has_amx() -> bool:
    lib = fused_library()
    assert lib is not None
    return bool(lib.hfa_amx(1))


@contextlib.contextmanager
def amx(wanted: bool) -> Iterator[None]:
    """Weights packed inside run on AMX tiles or on vectors."""
    lib = fused_library()
    assert lib is not None
    lib.hfa_amx(wanted)
    try:
        yield
    finally:
        lib.hfa_amx(1)


def random_case(rng: random.Random, epilogue: str, num_rows: int) -> dict[str, object]:
    """Keyword arguments of `check_case`, of odd sizes."""
    return {
        "num_rows": num_rows,
        "columns": rng.choice([rng.randint(1, 40), rng.randint(60, 150)]),
        "depth": rng.choice([rng.randint(1, 40), 64, 2 * rng.randint(20, 150) + 1, rng.randint(500, 1700)]),
        "epilogue": epilogue,
        "with_bias": rng.random() < 0.5,
        "with_residual": rng.random() < 0.5,
        "scale": rng.choice([1.0, 0.37]),
        "padding": rng.choice([0, 0, 5]),
    }


def check_case(
    dtype: torch.dtype, num_rows: int, columns: int, depth: int, epilogue: str, with_bias: bool, with_residual: bool,
    scale: float, padding: int,
) -> None:  # fmt: skip
    """One call against the torch chain, and its float32 sums against float64; on both paths where there are two."""
    x = torch.full((num_rows, depth + padding), float("nan")).to(dtype)[
        :, :depth
    ]  # what lies beside it must not be read
    x.copy_(torch.randn(num_rows, depth))
    weights = [torch.randn(columns, depth).to(dtype) / depth**0.5 for _ in range(2 if epilogue == "silu_mul" else 1)]
    biases = [torch.randn(columns).to(dtype) if with_bias else None for _ in weights]
    residual = torch.randn(num_rows, columns).to(dtype) if with_residual else None
    layout = "interleaved" if epilogue == "silu_mul" else "concat"
    expected = linear_reference(
        x.clone(memory_format=torch.contiguous_format),
        weights,
        biases,
        epilogue=epilogue,
        residual=residual,
        scale=scale,
    )
    outs = []
    for wanted in (True, False) if dtype == torch.bfloat16 and has_amx() else (False,):
        with amx(wanted):
            packed = PackedLinear(weights, biases, layout=layout)
        out = packed_linear(x, packed, epilogue=epilogue, residual=residual, scale=scale)
        assert_close(out, expected, dtype)
        assert torch.equal(
            out, packed_linear(x, packed, epilogue=epilogue, residual=residual, scale=scale, num_threads=3)
        )
        if epilogue == "plain":
            sums = packed_linear(x, packed, out_dtype=torch.float32)
            bias = 0 if biases[0] is None else biases[0].double()
            exact = x.double() @ weights[0].double().T + bias
            assert (sums.double() - exact).abs().max() < 4e-6 * (
                x.double().abs() @ weights[0].double().abs().T + 1
            ).max()
        outs.append(out)
    if len(outs) == 2:  # the sums differ in their last bits, so a rounded result may differ by a step
        torch.testing.assert_close(outs[0], outs[1], rtol=2e-2, atol=2e-2)
        assert (outs[0] != outs[1]).float().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["plain", "silu_mul"])
def test_every_number_of_rows(epilogue: str, dtype: torch.dtype) -> None:
    rng = random.Random(f"{epilogue} {dtype}")
    for num_rows in [*range(1, 71), 97, 129, 200, 513, 600]:
        check_case(dtype, **random_case(rng, epilogue, num_rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_rows", [20, 190, 193, 300, 530])
def test_deep_weights_in_several_blocks(num_rows: int) -> None:
    check_case(torch.bfloat16, num_rows, 130, 2300, "plain", True, True, 1.0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 6, 7, 8, 13, 19, 25, 64, 131, 300])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (63, 17), (65, 64), (200, 333), (128, 2500)])
def test_matches_float64(num_rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_rows * 1000 + columns)
    x = torch.randn(num_rows, depth).to(dtype)
    weight, bias = torch.randn(columns, depth).to(dtype), torch.randn(columns).to(dtype)
    packed = pack([weight], [bias])
    out = packed_linear(x, packed, out_dtype=torch.float32)
    exact = x.double() @ weight.double().T + bias.double()
    scale = (x.double().abs() @ weight.double().abs().T).max()
    assert (out.double() - exact).abs().max() < 4e-6 * scale
    assert_close(packed_linear(x, packed), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weights_share_one_panel(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 50).to(dtype)
    weights = [torch.randn(n, 50).to(dtype) for n in (70, 10, 33)]
    biases = [torch.randn(70).to(dtype), None, torch.randn(33).to(dtype)]
    out = packed_linear(x, pack(weights, biases))
    expected = torch.cat(
        [F.linear(x.double(), w.double(), None if b is None else b.double()) for w, b in zip(weights, biases)], 1
    )
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inter", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_silu_mul_residual_scale(dtype: torch.dtype, inter: int, num_rows: int) -> None:
    torch.manual_seed(inter)
    x = (3 * torch.randn(num_rows, 40)).to(dtype)
    gate, up = torch.randn(inter, 40).to(dtype), torch.randn(inter, 40).to(dtype)
    residual = torch.randn(num_rows, inter).to(dtype)
    packed = PackedLinear([gate, up], layout="interleaved")
    out = packed_linear(x, packed, epilogue="silu_mul", residual=residual, scale=0.3)
    expected = linear_reference(x, [gate, up], epilogue="silu_mul", residual=residual, scale=0.3)
    assert_close(out, expected, dtype)


def test_extreme_activations_stay_finite() -> None:
    x = torch.tensor([[-200.0], [-90.0], [0.0], [90.0], [200.0]])
    packed = PackedLinear([torch.ones(40, 1), torch.ones(40, 1)], layout="interleaved")
    out = packed_linear(x, packed, epilogue="silu_mul")
    torch.testing.assert_close(out, (F.silu(x) * x).expand(-1, 40), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repack_one_of_two_in_place(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 64).to(dtype)
    weights = [torch.randn(48, 64).to(dtype) for _ in range(2)]
    packed = pack(weights)
    handle, before = packed.handle, packed_linear(x, packed)
    packed.repack(1, -weights[1])
    after = packed_linear(x, packed)
    assert packed.handle == handle
    assert torch.equal(before[:, :48], after[:, :48])
    assert torch.equal(before[:, 48:], -after[:, 48:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_and_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(30, 200).to(dtype)[:, 20:150]
    weight = torch.randn(500, 300).to(dtype)[:, 7:137]
    one = packed_linear(x, pack([weight]), num_threads=1)
    assert_close(one, x.double() @ weight.double().T, dtype)
    assert torch.equal(one, packed_linear(x, pack([weight]), num_threads=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [96, 1701])
def test_rows_do_not_depend_on_batch_mates(dtype: torch.dtype, depth: int) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(230, depth).to(dtype), torch.randn(130, depth).to(dtype)
    packed = pack([weight])
    whole = packed_linear(x, packed)
    for row in range(37):
        assert torch.equal(whole[row : row + 1], packed_linear(x[row : row + 1], packed))
    for count in (20, 50, 90, 140):
        assert torch.equal(whole[7 : 7 + count], packed_linear(x[7 : 7 + count], packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [33, 70, 127])
def test_an_earlier_call_leaves_nothing_behind(dtype: torch.dtype, depth: int) -> None:
    """Rows and depth are padded in memory that earlier calls wrote: here with NaN."""
    poison, weight = pack([torch.randn(50, 256).to(dtype)]), torch.randn(50, depth).to(dtype)
    packed = pack([weight])
    for num_rows in (3, 21, 40, 100):
        packed_linear(torch.full((160, 256), float("nan")).to(dtype), poison)
        x = torch.randn(num_rows, depth).to(dtype)
        assert_close(packed_linear(x, packed), x.double() @ weight.double().T, dtype)


def test_weights_share_blocks_of_memory() -> None:
    """Packed weights come and go in any order; each keeps its values while its neighbours are freed."""
    rng, alive = random.Random(5), []
    for i in range(60):
        value = float(i + 1)
        alive.append((value, pack([torch.full((rng.choice([1, 70, 900]), rng.choice([8, 600, 2000])), value)])))
        if len(alive) > 8:
            del alive[rng.randrange(len(alive))]
        for value, packed in alive:
            out = packed_linear(torch.ones(1, packed.depth), packed)
            assert torch.equal(out, torch.full_like(out, value * packed.depth))


def test_bad_arguments_are_refused() -> None:
    packed = pack([torch.randn(8, 4)])
    with pytest.raises(ValueError, match="expected x"):
        packed_linear(torch.randn(2, 5), packed)
    with pytest.raises(ValueError, match="interleaved"):
        packed_linear(torch.randn(2, 4), packed, epilogue="silu_mul")
    with pytest.raises(ValueError, match="expected a weight"):
        packed.repack(0, torch.randn(8, 5))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        pack([torch.randn(8, 4).half()])
