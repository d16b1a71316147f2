"""The benchmarks run: definitions add up, every arm does the tiny model's workloads, the outputs agree, the CSV holds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _repository_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if str(ROOT) not in sys.path:
        monkeypatch.syspath_prepend(str(ROOT))


def _corpus() -> list[int]:
    from random import Random

    draw = Random(5)
    return [draw.randrange(3, 30000) for _ in range(8000)]


def test_workloads_are_as_described() -> None:
    from benchmarks import workloads

    made = {name: workloads.make(name, _corpus(), 2048) for name in workloads.NAMES}
    assert made == {name: workloads.make(name, _corpus(), 2048) for name in workloads.NAMES}  # seeded
    assert [len(stage) for stage in made["tree_of_thought"].stages] == [2, 4, 8, 16]
    assert made["self_consistency"].num_generated_tokens == 8 * 48
    assert made["multi_turn"].lengths()[-1] == (3 * (48 + 32) + 48, 32)
    lengths = made["random_lengths"].lengths()
    assert len(lengths) == 32 and all(16 <= n <= 128 for pair in lengths for n in pair)


def test_ideal_hit_rates() -> None:
    from benchmarks import workloads

    def ideal(name: str) -> float:
        return workloads.make(name, _corpus(), 2048).ideal_hit_rate()

    assert ideal("single_stream") == 0
    assert workloads.make("shared_prefix", _corpus(), 2048).num_pages(32) == 34 + 15 * 2
    assert ideal("shared_prefix") == pytest.approx(15 * 1024 / (16 * 1056), abs=1e-3)
    assert ideal("self_consistency") == pytest.approx(7 * 511 / (8 * 512))
    # turn t has 80 t + 48 prompt tokens, of which all but the last token generated before were computed
    assert ideal("multi_turn") == pytest.approx(sum(80 * t - 1 for t in (1, 2, 3)) / sum(80 * t + 48 for t in range(4)))


def test_quick_run_compares_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import arms, results, side_by_side

    path = tmp_path / "quick.csv"
    monkeypatch.setattr(arms, "THREAD_START_SECONDS", 0.05)
    names = ["multi_turn", "self_consistency"]
    options = ["--quick", "--strict", "--dtypes", "fp32", "--csv", str(path), "--arms", *arms.NAMES, "--readme"]
    assert side_by_side.main([*options, "--workloads", *names]) == 0
    rows = results.read(path)
    assert [(r["workload"], r["arm"]) for r in rows] == [(w, a) for w in names for a in arms.NAMES]
    for row in rows:
        assert row["num_tokens"] == row["num_tokens_wanted"] and row["capped"] == "0" and row["num_fallbacks"] == "0"
        assert float(row["tokens_per_second"]) > 0
        if row["workload"] != "self_consistency":
            assert float(row["equal_outputs"]) == 1
    ours = {r["workload"]: r for r in rows if r["arm"] == "hf_accel"}
    for row in ours.values():
        assert float(row["hit_rate"]) == pytest.approx(float(row["ideal_hit_rate"]), abs=1e-3)
    assert "| multi turn | tiny | fp32 |" in capsys.readouterr().out
    results.update([{**rows[0], "load": "9"}], path)
    assert results.read(path) == [{**rows[0], "load": "9"}, *rows[1:]]  # replaced in place, not added


def test_continuous_batching_forgets_prefixes_between_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import arms, models, workloads

    monkeypatch.setattr(arms, "THREAD_START_SECONDS", 0.05)
    bench = models.load("tiny", torch.float32, "cpu")
    workload = workloads.shrunk(workloads.make("single_stream", bench.corpus, bench.max_positions))
    arm = arms.ContinuousBatching(bench, workload)
    try:
        rates = []
        for forget in (arms.forget_prefixes, arms.forget_prefixes, lambda cache: None):
            monkeypatch.setattr(arms, "forget_prefixes", forget)
            arm.reset()
            rates.append(arm.run().hit_rate)
            arm.pause()
    finally:
        arm.close()
    assert rates[0] == rates[1] < rates[2]


def test_a_failing_arm_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import arms, side_by_side

    def broken(self: object) -> None:
        raise RuntimeError("no tokens today")

    monkeypatch.setattr(arms.GeneratePadded, "run", broken)
    options = ["--quick", "--dtypes", "fp32", "--csv", str(tmp_path / "q.csv"), "--workloads", "single_stream"]
    assert side_by_side.main(options) == 1
    assert "no tokens today" in capsys.readouterr().err


def test_profile_accounts_for_the_step(tmp_path: Path) -> None:
    from benchmarks import models, profile_step

    bench = models.load("tiny", torch.float32)
    seconds = profile_step.profile_engine(bench, batch=2, prompt=8, new_tokens=12, rounds=1)
    assert set(profile_step.PARTS) <= set(seconds)
    assert seconds["forward"] + seconds["native"] > 0 and seconds["plain_step"] > 0
    assert "HF generate" in profile_step.table(
        {"model": "tiny", "dtype": "fp32", "batch": 2}, {**seconds, "generate": 1.0}
    )


def test_memory_table_of_deepseek_models() -> None:
    from hf_accel.kv_cache.mla_pool import FP8, LatentShape, MLAPool

    text = (ROOT / "benchmarks" / "README.md").read_text()
    for name, layers, heads in (("V2-Lite", 27, 16), ("V2", 60, 128), ("V3", 61, 128)):
        shapes = [LatentShape(512, 64)] * layers
        expanded = layers * heads * (192 + 128) * 2
        wide, narrow = (MLAPool.bytes_per_token_for(shapes, dtype) for dtype in (torch.bfloat16, FP8))
        ratio = f"{expanded / wide:.1f}" if expanded / wide < 10 else f"{expanded / wide:.0f}"
        assert f"| {name} | {layers} x {heads} | {expanded:,} | {wide:,} | {narrow:,} | {ratio} |" in text


def test_mla_decode_compares_both_and_writes_rows(tmp_path: Path) -> None:
    from benchmarks import mla_decode, results

    path = tmp_path / "mla.csv"
    options = ["--models", "deepseek-v2-lite-3l", "--dtypes", "fp32", "--contexts", "24", "--new-tokens", "3"]
    assert mla_decode.main([*options, "--rounds", "1", "--csv", str(path)]) == 0
    rows = results.read(path)
    assert [row["arm"] for row in rows] == ["hf_generate", "hf_accel"]
    assert {row["kv_bytes_per_token"] for row in rows} == {str(3 * 576 * 4)}
    assert all(float(row["ms_per_token"]) > 0 and row["equal_outputs"] == "1" for row in rows)
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks" / "kernels").glob("bench_*.py")))
def test_kernel_benchmarks_start(script: str) -> None:
    path = ROOT / "benchmarks" / "kernels" / script
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr
