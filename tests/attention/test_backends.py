"""The attention backends against the oracle, and the choice among them."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_accel.attention import select as select_module
from hf_accel.attention.base import AttentionBackend
from hf_accel.attention.cpu_backend import CpuBackend
from hf_accel.attention.select import select_backend
from hf_accel.attention.torch_backend import TorchBackend
from hf_accel.attention.triton_backend import TritonBackend
from hf_accel_kernels import ops, reference
from hf_accel_kernels.cpu import library
from hf_accel_kernels.testing import PagedCase, make_paged_case

from ..cpp_ops import needs_cpp_ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run_step(backend: AttentionBackend, case: PagedCase, **options: object) -> torch.Tensor:
    """One step as the engine does it: this step's slots are poisoned, the backend stores them."""
    k_pages, v_pages = case.k_pages.clone(), case.v_pages.clone()
    page_size = k_pages.shape[2]
    pages, offsets = case.slot_mapping // page_size, case.slot_mapping % page_size
    k_pages[pages, :, offsets] = float("nan")
    v_pages[pages, :, offsets] = float("nan")
    out = backend.forward(case.q, case.k, case.v, k_pages, v_pages, backend.plan(case), scale=case.scale, **options)
    assert torch.equal(k_pages.nan_to_num(nan=7.0), case.k_pages.nan_to_num(nan=7.0))
    assert torch.equal(v_pages.nan_to_num(nan=7.0), case.v_pages.nan_to_num(nan=7.0))
    return out


def _interpreted(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    """The Triton backend on a CPU: its kernels run in the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU, not in the interpreter")
    from ..kernels.triton import interpreter

    interpreter.install()
    monkeypatch.setattr(ops, "why_not", lambda device: "")
    return TritonBackend(None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_cpp_ops), "torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 9},
        {"softcap": 20.0},
        {"sinks": True},
        {"sliding_window": 5, "softcap": 3.0, "sinks": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lens",
    [((1, 1, 1), (40, 3, 17)), ((6, 21), (6, 50)), ((1, 12, 1, 2), (33, 12, 1, 9))],
    ids=["decode", "prefill", "mixed"],
)
def test_step_matches_reference(
    name: str,
    device: str,
    dtype: torch.dtype,
    options: dict[str, object],
    lens: tuple[tuple[int, ...], tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cuda" and (name == "cpu" or not torch.cuda.is_available()):
        pytest.skip("the C++ op is for CPU tensors" if name == "cpu" else "no CUDA device")
    case = make_paged_case(*lens, num_kv_heads=2, group=3, head_dim=32, v_head_dim=24, dtype=dtype, device=device)
    if options.get("sinks"):
        options = {**options, "sinks": case.sinks.to(dtype)}
    backend = _interpreted(monkeypatch) if (name, device) == ("triton", "cpu") else select_backend(name, device, dtype)
    out = run_step(backend, case, **options)
    expected = reference.paged_attention(*case.arguments(), case.scale, **options)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=0)


def test_torch_decode_batch_matches_reference_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padded batch is CUDA's path; its arithmetic is checked here without one."""
    from hf_accel_kernels import torch_attention

    case = make_paged_case((1, 1, 5, 1), (40, 3, 11, 17), num_kv_heads=2, group=3, head_dim=32)
    for window in (0, 9, 100):
        out = torch.zeros(case.q.shape)
        decode, starts = [0, 1, 3], [0, 1, 2, 7, 8]
        torch_attention._attend_decode_batch(
            *case.arguments()[:5],
            decode,
            starts,
            case.seq_lens_cpu,
            torch_attention.Options(case.scale, window),
            out,
            None,
        )
        expected = reference.paged_attention(*case.arguments(), case.scale, sliding_window=window)
        rows = [0, 1, 7]
        torch.testing.assert_close(out[rows], expected[rows], atol=1e-5, rtol=0)
        assert not out[2:7].any()


@needs_cpp_ops
def test_auto_takes_the_cpp_op_on_cpu() -> None:
    assert isinstance(select_backend("auto", "cpu", torch.bfloat16), CpuBackend)
    assert isinstance(select_backend("cpu", "cpu", torch.float32), CpuBackend)
    assert isinstance(select_backend("torch", "cpu", torch.float32), TorchBackend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=select_module.__name__):
        assert isinstance(select_backend("auto", "cuda", torch.float16), TorchBackend)
    assert len(caplog.records) == 1 and "no CUDA device" in caplog.text
    with pytest.raises(ValueError, match="no CUDA device"):
        select_backend("triton", "cuda", torch.float16)
    with pytest.raises(ValueError, match="need a CUDA device, not cpu"):
        select_backend("triton", "cpu", torch.float16)
    with pytest.raises(ValueError, match="not torch\\.float64"):
        select_backend("triton", "cuda", torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_takes_triton_on_cuda() -> None:
    assert isinstance(select_backend("auto", "cuda", torch.float16), TritonBackend)


def test_triton_plans_leading_decode_rows_and_graphs() -> None:
    backend = TritonBackend(None)
    mixed = backend.plan(make_paged_case((1, 1, 5, 1), (40, 3, 11, 17), num_kv_heads=1, group=1, head_dim=8))
    assert (mixed.num_decode_rows, mixed.max_query_len, mixed.max_seq_len) == (2, 5, 40)
    decode = make_paged_case((1, 1), (4, 9), num_kv_heads=1, group=1, head_dim=8)
    captured = backend.plan_graph(decode)
    assert backend.supports_graphs and (captured.num_decode_rows, captured.max_seq_len) == (2, None)
    backend.refresh_graph(captured, decode)
    assert captured.page_table is decode.page_table and captured.seq_lens is decode.seq_lens


def test_auto_falls_back_with_one_line_and_a_name_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "load", lambda: (None, "no C++ compiler found"))
    with caplog.at_level(logging.WARNING, logger=select_module.__name__):
        assert isinstance(select_backend("auto", "cpu", torch.float32), TorchBackend)
    assert len(caplog.records) == 1 and "no C++ compiler found" in caplog.text
    with pytest.raises(ValueError, match="no C\\+\\+ compiler found"):
        select_backend("cpu", "cpu", torch.float32)


def test_refusals_name_the_reason() -> None:
    with pytest.raises(ValueError, match="float64"):
        select_backend("cpu", "cpu", torch.float64)
    with pytest.raises(ValueError, match="not on the CPU"):
        select_backend("cpu", "cuda", torch.float32)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        select_backend("flash", "cpu", torch.float32)
