"""The GPU suite runs: every case of every section on tiny shapes, its rows say what they should, failures stay where they are."""

from __future__ import annotations

import importlib.metadata
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
UNTIMED = {"not there", "skipped", "not measured"}


@pytest.fixture(autouse=True)
def _repository_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if str(ROOT) not in sys.path:
        monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The rows of a whole smoke run, without processes of their own."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import arms, gpu_suite, results

    path = tmp_path_factory.mktemp("suite") / "smoke.csv"
    patch = pytest.MonkeyPatch()
    patch.setattr(arms, "THREAD_START_SECONDS", 0.05)
    try:
        code = gpu_suite.main(["--smoke", "--in-process", "--device", "cpu", "--csv", str(path)])
    finally:
        patch.undo()
        sys.path.remove(str(ROOT))
    rows = results.read(path)
    assert code == 0, [r for r in rows if r["status"] in ("failed", "wrong")]
    return rows


def test_csv_has_its_columns_and_every_section(smoke: list[dict[str, str]]) -> None:
    from benchmarks import gpu_suite
    from benchmarks.gpu import record

    assert tuple(smoke[0]) == record.COLUMNS
    assert {r["section"] for r in smoke} == {"targets", *gpu_suite.SECTIONS}
    assert {r["status"] for r in smoke} <= {"ok", "not there", "not measured"}
    for r in smoke:
        assert (
            r["card"] == "CPU"
            and r["torch"] == importlib.metadata.version("torch")
            and r["date"]
            and "--smoke" in r["command"]
        )
        assert (r["value"] == "") == (r["status"] in UNTIMED), r
        if r["value"]:
            assert math.isfinite(float(r["value"])) and (float(r["value"]) > 0 or r["metric"] == "idle share"), r
        if r["floor"]:
            assert float(r["share"]) == pytest.approx(float(r["floor"]) / float(r["value"]), rel=2e-3)


def test_kernels_are_right_and_complete(smoke: list[dict[str, str]]) -> None:
    from benchmarks.gpu import kernels

    rows = [r for r in smoke if r["section"] == "kernels" and r["case"] != "whole section"]
    assert [*dict.fromkeys(r["case"] for r in rows)] == list(kernels.CASES)
    for case in kernels.CASES:
        forms = {r["form"]: r for r in rows if r["case"] == case}
        assert {"hf_accel", "torch"} <= set(forms), case
        assert forms["torch"]["status"] == "ok" and float(forms["torch"]["error"]) < 1e-4
        assert all(r["note"] for r in forms.values() if r["status"] == "not there")
    for name in ("paged_decode", "paged_prefill", "mla_decode", "token_bitmask"):
        ours = [r for r in rows if r["case"].startswith(name) and r["form"] == "hf_accel"]
        assert ours and all(r["status"] == "ok" for r in ours), name


def test_models_workloads_and_latencies(smoke: list[dict[str, str]]) -> None:
    from benchmarks.gpu import shapes, throughput

    def of(section: str, **columns: str) -> list[dict[str, str]]:
        columns["section"] = section
        return [r for r in smoke if all(r[k] == v for k, v in columns.items())]

    for name in shapes.SHAPES:
        for part in ("step, batch 64", "step, batch 1", "prefill"):
            assert len(of("models", case=f"{name}: {part}", metric="ms")) == 1
        shares = [float(r["share"]) for r in of("models", case=f"{name}: step, batch 64, kernels")]
        assert shares and sum(shares) <= 1.001 and shares == sorted(shares, reverse=True)
        (idle,) = of("models", case=f"{name}: step, batch 64", form="profiler")
        assert 0 <= float(idle["value"]) < 1
    for workload in throughput.WORKLOADS:
        for other in ("padded", "generate_batch"):
            case = f"{workload} vs {other}"
            (ratio,) = of("throughput", case=case, metric="ratio")
            rates = {r["form"]: r for r in of("throughput", case=case, metric="tokens/s") if r["error"]}
            theirs = next(r for form, r in rates.items() if form != "hf_accel")
            assert {r["error"] for r in rates.values()} == {"0"}  # fp32: outputs equal, each as long as wanted
            expected = float(rates["hf_accel"]["value"]) / float(theirs["value"])
            assert float(ratio["value"]) == pytest.approx(expected, rel=5e-3)
    assert of("switches", form="default", metric="ms")
    for what in ("ttft", "itl"):
        p50, p95, p99 = (
            float(of("latency", case="load 0.8", metric=f"{what} p{p} ms")[0]["value"]) for p in (50, 95, 99)
        )
        assert p50 <= p95 <= p99


def test_targets_say_met_or_missed(smoke: list[dict[str, str]]) -> None:
    from benchmarks.gpu import record

    rows = {r["case"]: r for r in smoke if r["section"] == "targets"}
    assert list(rows) == list(record.TARGETS)
    for name, r in rows.items():
        target = record.TARGETS[name]
        assert float(r["target"]) == target.bound
        assert r["status"] == "ok"
        sources = [s for s in smoke if s["target_name"] == name and s["section"] != "targets" and s["measured"]]
        assert r["measured"] in {s["measured"] for s in sources}
        assert r["met"] == ("yes" if target.met(float(r["measured"])) else "no")


def test_targets_take_the_best_own_form_and_mark_what_is_missing() -> None:
    from benchmarks.gpu import record

    def share(form: str, value: float, **more: Any) -> dict[str, Any]:
        return record.row("kernels", "d", form, "ms", 1.0, share=value, target_name="paged_decode_bandwidth", **more)

    rows = [share("hf_accel", 0.7), share("flashinfer", 0.85), share("torch", 0.99), share("x", 0.97, status="wrong")]
    rows.append(record.row("models", "m", "hf_accel", "idle share", 0.02, target_name="idle_share_64"))
    found = {r["case"]: r for r in record.target_rows(rows)}
    assert (found["paged_decode_bandwidth"]["measured"], found["paged_decode_bandwidth"]["met"]) == (0.85, "yes")
    assert found["paged_decode_bandwidth"]["form"] == "flashinfer" and rows[0]["met"] == "no"
    assert found["idle_share_64"]["met"] == "yes"  # below is better
    assert found["nano_vs_padded"]["status"] == "not measured" and "met" not in found["nano_vs_padded"]


def test_without_time_everything_is_skipped_and_said_so(tmp_path: Path) -> None:
    from benchmarks import gpu_suite, results

    path = tmp_path / "none.csv"
    options = ["--smoke", "--in-process", "--device", "cpu", "--budget", "0.01", "--csv", str(path)]
    assert gpu_suite.main([*options, "--only", "kernels", "models"]) == 0
    rows = [r for r in results.read(path) if r["case"] != "whole section"]
    assert {r["section"] for r in rows} == {"targets", "ceilings", "kernels", "models"}
    assert {r["status"] for r in rows if r["section"] != "targets"} == {"skipped"}
    assert {r["status"] for r in rows if r["section"] == "targets"} == {"not measured"}


_SECTION = """
import os, time
from benchmarks.gpu.context import Case, NotThere

def cases(ctx):
    def broken(ctx): raise ValueError("no figures today")
    def missing(ctx): raise NotThere("no such op")
    def fine(ctx): ctx.row("form", "ms", 2.0)
    def dies(ctx): ctx.row("form", "ms", 1.0); os._exit(7)
    return [Case("broken", broken), Case("missing", missing), Case("dies", dies), Case("fine", fine),
            Case("hangs", lambda ctx: time.sleep(600), limit=0.5), Case("last", fine), Case("late", fine, least=1e9)]
"""


def test_a_section_survives_what_its_cases_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_suite
    from benchmarks.gpu import isolation

    (tmp_path / "section_of_faults.py").write_text(_SECTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    order = {
        "module": "section_of_faults", "section": "faults", "device": "cpu", "smoke": True, "copy": 0.0, "gemm": 0.0,
        "deadline": time.monotonic() + 300, "only": [],
    }  # fmt: skip
    workers, rows = isolation.Workers(), []
    try:
        gpu_suite.run_section(order, workers.run(order, more=False), rows, lambda: None)
    finally:
        workers.close()
    got = [(r["case"], r["status"], r["value"]) for r in rows[:-1]]
    assert got == [
        ("broken", "failed", None), ("missing", "not there", None), ("dies", "ok", 1.0), ("dies", "failed", None),
        ("fine", "ok", 2.0), ("hangs", "failed", None), ("last", "ok", 2.0), ("late", "skipped", None),
    ]  # fmt: skip
    notes = {(r["case"], r["status"]): r.get("note") for r in rows}
    assert "no figures today" in notes["broken", "failed"] and "section_of_faults" in notes["broken", "failed"]
    assert "exit code 7" in notes["dies", "failed"] and "hung" in notes["hangs", "failed"]


def test_an_op_that_writes_garbage_is_called_wrong() -> None:
    from benchmarks.gpu.context import Ceilings, Context
    from benchmarks.gpu.kernel_case import Form, Problem, error_of, find, measure

    rows: list[dict[str, Any]] = []
    ctx = Context("kernels", torch.device("cpu"), True, Ceilings(1e9, 1e9), time.monotonic() + 60, rows.append, "case")
    x = torch.randn(40)
    problem = Problem(160, 0, 1, reference=lambda: x * 2)
    problem.form("right")(lambda: Form(lambda i: x * 2 + 1e-7))
    problem.form("wrong")(lambda: Form(lambda i: x * 2.01))
    problem.form("nan")(lambda: Form(lambda i: x * torch.nan))
    problem.form("raises")(lambda: Form(lambda i: x @ torch.ones(3)))
    problem.form("absent")(lambda: Form(find("hf_accel_kernels.ops", "no_such_op")))
    measure(ctx, problem)
    assert [r["status"] for r in rows] == ["ok", "wrong", "wrong", "failed", "not there"]
    infinite = torch.tensor([1.0, -torch.inf])
    assert error_of(infinite, infinite) == 0 and error_of(infinite, torch.tensor([-torch.inf, 1.0])) == math.inf
    assert error_of(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


class _Device:
    """A stand-in for torch.cuda whose work takes time that is counted, not waited for."""

    def __init__(self, capturable: bool) -> None:
        self.now, self.capturable, self.recording, self.flushed = 0.0, capturable, None, 0

    def work(self, ms: float) -> None:
        if self.recording is None:
            self.now += ms
        elif not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        else:
            self.recording.ms += ms

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Graph:
            ms = 0.0

            def replay(self) -> None:
                device.now += self.ms

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = math.nan

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        @contextmanager
        def graph(made: Any) -> Iterator[None]:
            device.recording = made
            try:
                yield
            finally:
                device.recording = None

        class Flush:
            def zero_(self) -> None:
                device.now += 0.07
                device.flushed += 1

        for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": graph, "synchronize": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Flush())


@pytest.mark.parametrize("capturable", [True, False])
def test_device_timing_counts_one_call(monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
    from benchmarks.gpu import timing

    device = _Device(capturable)
    device.install(monkeypatch)
    sets: list[int] = []

    def call(i: int) -> None:
        sets.append(i)
        device.work(0.25)

    got = timing.time_call(call, 3, torch.device("cuda"), seconds=0.01, max_rounds=7)
    assert got.ms == pytest.approx(0.25) and got.mode == ("graph" if capturable else "events")
    assert set(sets) == {0, 1, 2} and 3 <= got.rounds <= 7
    assert bool(device.flushed) == (not capturable)


def test_costs_are_those_of_the_published_models() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, initialization

    from benchmarks.gpu import shapes

    for name, billions, kv_bytes in (
        ("llama-3-8b", 8.03, 131072),
        ("llama-3.2-1b", 1.236, 32768),
        ("qwen3-0.6b", 0.596, 114688),
        ("deepseek-v2-lite", 15.7, 31104),
    ):
        with torch.device("meta"), initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes.SHAPES[name]), dtype=torch.bfloat16)
        model.tie_weights()
        costs = shapes.costs(model)
        num_parameters = sum(p.numel() for p in model.parameters())
        assert num_parameters / 1e9 == pytest.approx(billions, rel=0.01) and costs.kv_bytes == kv_bytes
        embedding = model.get_input_embeddings().weight
        tied = embedding is model.get_output_embeddings().weight
        read = num_parameters - (0 if tied else embedding.numel())
        assert costs.dense_bytes + costs.num_experts * costs.expert_bytes == pytest.approx(2 * read)
        assert costs.step(1, 1000)[0] <= 2 * read + 1000 * kv_bytes <= costs.step(10**6, 1000)[0]
        token = costs.step(1, 0)[1]  # two FLOPs for each weight that a token meets
        routed = costs.num_experts * costs.expert_bytes / 2
        met = read - routed + (routed * costs.experts_per_token / costs.num_experts if routed else 0)
        assert token == pytest.approx(2 * met)
