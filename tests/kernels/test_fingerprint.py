"""The sampled fingerprint: against a plain Python form, and by changing what it must and must not notice."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from hf_accel_kernels import fingerprint as module
from hf_accel_kernels.fingerprint import SampledFingerprint

_MASK = (1 << 64) - 1


@pytest.fixture(params=["native", "torch"])
def form(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "_native", lambda: None)
    elif module._native() is None:
        pytest.skip("the C++ ops are not built here")
    return request.param


def _mix(state: int, word: int) -> int:
    state = ((state ^ word) * 0x9E3779B97F4A7C15) & _MASK
    return state ^ (state >> 29)


def _reference(ranges: list[bytes], samples: int, seed: int) -> int:
    """The C++ function in plain Python."""
    state = _mix(seed, len(ranges))
    for data in ranges:
        state = _mix(state, len(data))
        if len(data) < 8:
            state = _mix(state, int.from_bytes(data, "little"))
            continue
        words = (len(data) + 7) // 8
        count = min(words, samples)
        for j in range(count):
            at = len(data) - 8 if j == count - 1 else 8 * int(j * ((words - 1) / (count - 1)))
            state = _mix(state, int.from_bytes(data[at : at + 8], "little"))
    return state


@pytest.mark.parametrize("samples", [2, 7, 16])
def test_native_matches_reference(samples):
    function = module._native()
    if function is None:
        pytest.skip("the C++ ops are not built here")
    rng = random.Random(samples)
    for _ in range(20):
        ranges = [rng.randbytes(rng.choice([0, 1, 7, 8, 9, 15, 16, 17, 40, 129, 1000, 4097])) for _ in range(5)]
        buffers = [ctypes.create_string_buffer(data, max(len(data), 1)) for data in ranges]
        pointers = (ctypes.c_void_p * 5)(*[ctypes.addressof(buffer) for buffer in buffers])
        sizes = (ctypes.c_int64 * 5)(*map(len, ranges))
        seed = rng.getrandbits(64)
        assert function(pointers, sizes, 5, samples, seed) == _reference(ranges, samples, seed)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex128]
)
def test_first_and_last_element_and_every_small_tensor(form, dtype):
    for shape in [(), (1,), (3,), (5, 3), (16,), (17,), (1000,), (33, 31)]:
        tensor = torch.zeros(shape, dtype=dtype)
        tensors = [torch.zeros(3), tensor, torch.zeros(2)]
        plan = SampledFingerprint(tensors)
        before = plan.compute(tensors)
        assert plan.compute(tensors) == before
        flat = tensor.view(-1)
        small = flat.numel() <= 16 and flat.numel() * flat.element_size() <= 128
        positions = range(flat.numel()) if small else (0, flat.numel() - 1)
        for position in positions:
            flat[position] = 1 + 1j if dtype.is_complex else 1
            assert plan.compute(tensors) != before, (shape, position)
            flat[position] = 0
            assert plan.compute(tensors) == before


def test_any_block_of_an_eighth_is_noticed(form):
    tensor = torch.zeros(4096)
    plan = SampledFingerprint([tensor])
    before = plan.compute([tensor])
    for start in range(0, 4096 - 512, 100):
        tensor[start : start + 512] = 1
        assert plan.compute([tensor]) != before
        tensor.zero_()


@pytest.mark.parametrize(
    "make",
    [lambda base: base.T, lambda base: base[:, ::3], lambda base: base[2:, 1:], lambda base: base[:1].expand(5, -1)],
)
def test_views(form, make):
    base = torch.randn(40, 50)
    view = make(base)
    plan = SampledFingerprint([view])
    before = plan.compute([view])
    base.add_(1)
    assert plan.compute([view]) != before


def test_swapped_contents_are_noticed(form):
    a, b = torch.randn(100), torch.randn(100)
    plan = SampledFingerprint([a, b])
    before = plan.compute([a, b])
    old = a.clone()
    a.copy_(b)
    b.copy_(old)
    assert plan.compute([a, b]) != before


def test_nothing_to_read(form):
    assert SampledFingerprint([]).compute([]) == SampledFingerprint([]).compute([])
    empty = torch.zeros(0, 4)
    assert SampledFingerprint([empty]).compute([empty]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    tensors = [torch.randn(300, 70, device="cuda"), torch.randn(9, device="cuda").bfloat16(), torch.randn(5)]
    plan = SampledFingerprint(tensors)
    before = plan.compute(tensors)
    assert plan.compute(tensors) == before
    for tensor in tensors:
        tensor.add_(1)
        assert plan.compute(tensors) != before
        before = plan.compute(tensors)
