"""The FlashInfer backend against the torch backend, over a stand-in for the library; its very calls against the real signatures."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from hf_accel.attention import flashinfer_backend, flashinfer_plans
from hf_accel.attention import select as select_module
from hf_accel.attention.flashinfer_backend import FlashInferBackend
from hf_accel.attention.latent import LatentLayer, LatentPlan, attend_latent
from hf_accel.attention.torch_backend import TorchBackend
from hf_accel.attention.triton_backend import TritonBackend
from hf_accel_kernels import mla
from hf_accel_kernels.mla_testing import make_mla_case
from hf_accel_kernels.testing import PagedCase, make_paged_case

from . import fake_flashinfer

BF16 = torch.bfloat16
DECODE, MIXED = ((1, 1, 1), (40, 3, 32)), ((1, 12, 0, 1, 2), (33, 12, 7, 1, 19))


class CountingBackend(TorchBackend):
    """Serves what FlashInfer does not, and counts it."""

    def __init__(self) -> None:
        self.calls = 0

    def attend(self, *args, **options):
        self.calls += 1
        return super().attend(*args, **options)

    def absorbed_attention(self, *args):
        self.calls += 1
        return super().absorbed_attention(*args)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr(flashinfer_plans, "WORKSPACE_BYTES", 64)


@pytest.fixture
def backend() -> FlashInferBackend:
    return FlashInferBackend(CountingBackend(), strict=True)


def both(backend: FlashInferBackend, case: PagedCase, metadata=None, **options) -> int:
    """One step on both backends from pages in which this step's slots are poisoned; -> calls that went to the other."""
    before = backend.other.calls
    results = []
    for each in (backend, TorchBackend()):
        pages = [case.k_pages.clone(), case.v_pages.clone()]
        for page in pages:
            page[case.slot_mapping // page.shape[2], :, case.slot_mapping % page.shape[2]] = float("nan")
        planned = metadata if metadata is not None and each is backend else each.plan(case)
        results.append(each.forward(case.q, case.k, case.v, *pages, planned, scale=1.7 * case.scale, **options))
    torch.testing.assert_close(results[0], results[1], atol=2e-2, rtol=0)
    return backend.other.calls - before


@pytest.mark.parametrize("lens", [DECODE, MIXED, ((21,), (50,))], ids=["decode", "mixed", "chunk"])
@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize("page_size", [16, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 9}, {"sliding_window": 1}, {"softcap": 3.0}, {"sliding_window": 5, "softcap": 2.0}],
)
def test_steps_match_the_torch_backend(backend, lens, group, page_size, options):
    case = make_paged_case(*lens, num_kv_heads=2, group=group, head_dim=64, page_size=page_size, dtype=BF16)
    assert both(backend, case, **options) == 0


def test_layers_of_a_kind_share_one_plan_a_step(backend):
    case = make_paged_case(*MIXED, num_kv_heads=2, group=2, head_dim=64, dtype=BF16)
    for step in (1, 2):
        metadata = backend.plan(case)
        for options in ({}, {"sliding_window": 9}, {}, {"sliding_window": 9}):
            assert both(backend, case, metadata, **options) == 0
        wrappers = backend._workspaces.wrappers.values()
        assert [wrapper.library.num_plans for wrapper in wrappers] == [step, step]


def test_two_steps_whose_layers_take_turns(backend):
    cases = [make_paged_case((1, n), (9, 30), num_kv_heads=2, group=2, head_dim=64, dtype=BF16) for n in (5, 7)]
    steps = [(case, backend.plan(case)) for case in cases]
    for case, metadata in [*steps, *steps]:
        assert both(backend, case, metadata) == 0


def test_what_it_does_not_compute_goes_to_the_other_backend(backend):
    case = make_paged_case(*DECODE, num_kv_heads=2, group=2, head_dim=64, dtype=BF16)
    assert both(backend, case, sinks=case.sinks) == 1
    short = make_paged_case((1, 1), (5, 4), num_kv_heads=2, group=2, head_dim=64, dtype=BF16)
    short = replace(short, seq_lens=torch.tensor([5, 0], dtype=torch.int32), seq_lens_cpu=(5, 0))
    assert both(backend, short) == 1


def test_a_name_that_cannot_be_met_is_an_error_and_auto_falls_back(backend, caplog):
    case = make_paged_case(*DECODE, num_kv_heads=2, group=2, head_dim=80, dtype=BF16)
    with pytest.raises(ValueError, match=r"not 80 with values of 80; choose"):
        both(backend, case)
    automatic = FlashInferBackend(CountingBackend(), strict=False)
    with caplog.at_level(logging.WARNING, logger=flashinfer_backend.__name__):
        assert both(automatic, case) == both(automatic, case) == 1
    assert len(caplog.records) == 1


def test_a_library_that_fails_to_load(backend, monkeypatch, caplog):
    def broken(self, *args, **options):
        raise OSError("no compiler")

    monkeypatch.setattr(fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper, "plan", broken)
    case = make_paged_case(*DECODE, num_kv_heads=2, group=2, head_dim=64, dtype=BF16)
    with pytest.raises(ValueError, match="OSError: no compiler"):
        both(backend, case)
    automatic = FlashInferBackend(CountingBackend(), strict=False)
    with caplog.at_level(logging.WARNING, logger=flashinfer_backend.__name__):
        assert both(automatic, case) == both(automatic, case) == 1
    assert len(caplog.records) == 1 and "no compiler" in caplog.text
    mixed = make_paged_case(*MIXED, num_kv_heads=2, group=2, head_dim=128, dtype=BF16)
    assert both(automatic, mixed) == 0  # another kind of layer


@pytest.mark.parametrize("group", [4, 5])
def test_decode_does_without_tensor_cores_where_their_module_is_missing(backend, group, monkeypatch):
    original = fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan

    def plan(self, **arguments):
        if self._tensor_cores:
            raise OSError("no such module")
        return original(self, **arguments)

    monkeypatch.setattr(fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper, "plan", plan)
    case = make_paged_case(*DECODE, num_kv_heads=2, group=group, head_dim=64, dtype=BF16)
    if group == 5:  # which only that module has
        with pytest.raises(ValueError, match="no such module"):
            both(backend, case)
    else:
        assert both(backend, case) == both(backend, case) == 0
    assert both(FlashInferBackend(CountingBackend(), strict=False), case) == 1


@pytest.mark.parametrize("strict", [True, False])
def test_only_a_request_by_name_may_compile(strict, monkeypatch):
    seen = []
    original = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan

    def plan(self, **arguments):
        seen.append(os.environ.get("FLASHINFER_DISABLE_JIT"))
        return original(self, **arguments)

    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    monkeypatch.setattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    case = make_paged_case(*MIXED, num_kv_heads=2, group=2, head_dim=64, dtype=BF16)
    assert both(FlashInferBackend(CountingBackend(), strict=strict), case) == 0
    assert seen == [None if strict else "1"] and "FLASHINFER_DISABLE_JIT" not in os.environ


@dataclass
class Batch:
    """A captured step's buffers, and the host's lengths."""

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    query_lens_cpu: tuple[int, ...]
    seq_lens_cpu: tuple[int, ...]


def buffers_of(case, slots: torch.Tensor) -> Batch:
    wide = torch.zeros(len(case.seq_lens), 12, dtype=torch.int32)
    wide[:, : case.page_table.shape[1]] = case.page_table
    lens = tuple(case.seq_lens.tolist())
    return Batch(wide, case.seq_lens.clone(), case.query_start_loc, slots, (1,) * len(lens), lens)


@pytest.mark.parametrize("group", [1, 4])
def test_a_captured_step_is_planned_again_before_each_replay(backend, group):
    cases = [
        make_paged_case((1, 1, 1), lens, num_kv_heads=2, group=group, head_dim=64, dtype=BF16, seed=sum(lens))
        for lens in ((40, 3, 32), (130, 1, 16), (2, 90, 33))
    ]
    held = buffers_of(cases[0], cases[0].slot_mapping)
    metadata = backend.plan_graph(held)
    wrappers = set()
    for case in cases:
        held.__dict__.update(buffers_of(case, case.slot_mapping).__dict__)
        metadata = replace(metadata, slot_mapping=case.slot_mapping)  # on a device: the same buffer, written again
        backend.refresh_graph(metadata, held)
        for options in ({}, {"sliding_window": 9}):
            assert both(backend, case, metadata, **options) == 0
        wrappers |= {id(wrapper) for wrapper in metadata.plans._planned.values()}
    assert len(wrappers) == 2 and not backend._workspaces.wrappers
    addresses = {b.indices.data_ptr() for b in metadata.plans._buffers.values()}
    assert len(addresses) == 1


def latent_step(case, metadata_of, backend, *, fp8=False):
    num_heads = case.q.shape[1]
    weights = mla.AbsorbedWeights(case.weight, num_heads, case.nope)
    layer = LatentLayer(case.pages, case.scales, weights, lambda x: x @ case.weight.T, case.nope, weights.v)
    metadata = metadata_of(backend)
    rows = case.pages.flatten(0, 1)[metadata.slot_mapping].to(case.q.dtype)
    args = (case.heads_q, rows[:, : case.rank], rows[:, case.rank :], layer, LatentPlan(metadata, num_heads), metadata)
    return attend_latent(backend, *args, scale=case.scale)


def latent_batch(case) -> Batch:
    query_lens, seq_lens = case.query_start_loc.diff().tolist(), case.seq_lens.tolist()
    slots = [
        int(case.page_table[i, p // case.pages.shape[1]]) * case.pages.shape[1] + p % case.pages.shape[1]
        for i, (n, total) in enumerate(zip(query_lens, seq_lens))
        for p in range(total - n, total)
    ]
    return Batch(*case.tables, torch.tensor(slots), tuple(query_lens), tuple(seq_lens))


@pytest.mark.parametrize(
    ("num_heads", "lens", "others"),
    [
        (16, DECODE, 0),
        (20, DECODE, 0),
        (16, ((1, 3, 1), (33, 12, 40)), 0),
        (20, ((1, 7, 1), (33, 12, 40)), 1),  # heads that do not fill its tiles: decode only
        (16, ((1, 130, 1), (33, 200, 40)), 0),  # the long chunk is expanded, the others are a batch of their own
    ],
)
def test_latent_layers(backend, num_heads, lens, others):
    case = make_mla_case(*lens, num_heads=num_heads, rank=512, rope=64, nope=8, v=8, page_size=5, dtype=BF16)
    batch = latent_batch(case)
    got = latent_step(case, lambda each: each.plan(batch), backend)
    expected = latent_step(case, lambda each: each.plan(batch), TorchBackend())
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=2e-2)
    assert backend.other.calls == others


@pytest.mark.parametrize("options", [{"fp8": True}, {"rank": 256, "rope": 32}])
def test_latent_layers_of_other_sorts_go_to_the_other_backend(backend, options):
    options = {"rank": 512, "rope": 64, **options}
    batch = latent_batch(case := make_mla_case(*DECODE, num_heads=16, nope=8, v=8, dtype=BF16, **options))
    got = latent_step(replace(case, pages=case.pages.clone()), lambda each: each.plan(batch), backend)
    expected = latent_step(case, lambda each: each.plan(batch), TorchBackend())
    assert torch.equal(got, expected) and backend.other.calls == 1


def test_a_captured_latent_step(backend):
    metadata = None
    for lens in ((40, 3, 32), (130, 1, 16)):
        case = make_mla_case((1, 1, 1), lens, num_heads=16, rank=512, rope=64, nope=8, v=8, dtype=BF16)
        batch = latent_batch(case)
        batch.page_table = torch.nn.functional.pad(batch.page_table, (0, 12 - batch.page_table.shape[1]))
        if metadata is None:
            metadata = backend.plan_graph(batch)
        backend.refresh_graph(metadata, batch)
        current = replace(metadata, **batch.__dict__)
        got = latent_step(case, lambda each, current=current: current, backend)
        expected = latent_step(case, lambda each, batch=batch: each.plan(batch), TorchBackend())
        torch.testing.assert_close(got, expected, atol=3e-2, rtol=2e-2)
    assert backend.other.calls == 0


def test_the_choice(monkeypatch, caplog):
    monkeypatch.setattr(select_module, "why_not", lambda device: "")
    monkeypatch.setattr(TritonBackend, "__init__", lambda self, device=None: None)
    monkeypatch.setattr(select_module, "why_not_flashinfer", lambda: "")
    chosen = select_module.select_backend("auto", "cuda", BF16)
    assert isinstance(chosen, FlashInferBackend) and isinstance(chosen.other, TritonBackend) and not chosen.strict
    assert select_module.select_backend("flashinfer", "cuda", torch.float16).strict
    assert isinstance(select_module.select_backend("auto", "cuda", torch.float32), TritonBackend)
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        select_module.select_backend("flashinfer", "cuda", torch.float32)
    monkeypatch.setattr(select_module, "why_not_flashinfer", lambda: "it is not installed")
    assert isinstance(select_module.select_backend("auto", "cuda", BF16), TritonBackend)
    with pytest.raises(ValueError, match="it is not installed; choose"):
        select_module.select_backend("flashinfer", "cuda", BF16)


def test_the_reason_is_named_where_it_is_not_installed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flashinfer" else found(name))
    assert "flashinfer is not installed: pip install" in flashinfer_backend.why_not_flashinfer()


def test_our_calls_bind_to_the_real_signatures(backend, monkeypatch):
    """Where the library is installed: every call that the stand-in got is one that the real wrappers take."""
    for name in ("flashinfer", "flashinfer.mla"):
        monkeypatch.delitem(sys.modules, name)
    real = pytest.importorskip("flashinfer")
    pytest.importorskip("flashinfer.mla")
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper as RealDecode

    targets = {
        ("BatchDecodeWithPagedKVCacheWrapper", "plan"): RealDecode._plan_impl,
        ("MLAPlanMetadata", "csr"): real.mla.MLAPlanMetadata.csr,
    }
    calls = []

    def recorded(kind, method):
        cls = getattr(fake_flashinfer, kind)
        original = inspect.getattr_static(cls, method)
        original = original.__func__ if isinstance(original, classmethod) else original
        target = targets.get((kind, method)) or getattr(getattr(real, kind, None) or getattr(real.mla, kind), method)

        def call(self, *args, **options):
            bound = () if inspect.ismethod(target) else (self,)
            inspect.signature(target).bind(*bound, *args, **options)
            calls.append((kind, method))
            return original(self, *args, **options)

        monkeypatch.setattr(cls, method, classmethod(call) if method == "csr" else call)

    for kind in (
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchMLAPagedAttentionWrapper",
    ):
        for method in ("__init__", "plan", "run"):
            recorded(kind, method)
    recorded("MLAPlanMetadata", "csr")
    recorded("BatchDecodeWithPagedKVCacheWrapper", "reset_workspace_buffer")
    fake_flashinfer.install(monkeypatch)
    for lens in (DECODE, MIXED):
        both(backend, make_paged_case(*lens, num_kv_heads=2, group=2, head_dim=64, dtype=BF16))
    test_a_captured_step_is_planned_again_before_each_replay(FlashInferBackend(CountingBackend(), strict=True), 4)
    test_a_captured_latent_step(FlashInferBackend(CountingBackend(), strict=True))
    assert len(set(calls)) == 11
