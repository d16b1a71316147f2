"""Packed linears against float64 matrix products on odd shapes, both instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hf_accel_kernels.cpu import library
from hf_accel_kernels.fused_reference import linear_reference
from hf_accel_kernels.packed import PackedLinear, pack, packed_linear

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no CPU ops: {library.load()[1]}")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


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


def test_rows_do_not_depend_on_batch_mates() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(37, 96), torch.randn(130, 96)
    packed = pack([weight])
    whole = packed_linear(x, packed)
    for row in range(37):
        assert torch.equal(whole[row : row + 1], packed_linear(x[row : row + 1], packed))


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


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["x86-64-v3", "x86-64-v4"])
def test_other_instruction_sets(arch: str, tmp_path: Path) -> None:
    if arch == "x86-64-v4" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AVX512 here")
    env = os.environ | {"HF_ACCEL_CPU_ARCH": arch, "HF_ACCEL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not other_instruction_sets", __file__]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert list(tmp_path.glob("*.so"))
