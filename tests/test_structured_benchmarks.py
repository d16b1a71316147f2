"""The structured output benchmarks run, with the peers that are installed and without any; their cases are what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _repository_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if str(ROOT) not in sys.path:
        monkeypatch.syspath_prepend(str(ROOT))


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def test_smoke_run_measures_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import results, structured

    assert structured.main(["--smoke", "--out", str(tmp_path)]) == 0
    assert "figures mean nothing" in capsys.readouterr().out
    rows = {
        name: results.read(tmp_path / f"structured_{name}.csv") for name in ("compile", "mask", "generation", "json")
    }
    assert not [r for section in rows.values() for r in section if r["note"]]
    assert all(r["machine"] and r["command"] for section in rows.values() for r in section)

    peers = [peer for peer in ("outlines_core", "xgrammar", "llguidance") if _installed(peer)]
    compiled = {(r["case"], r["side"]) for r in rows["compile"] if r["metric"] == "compile, ms"}
    assert compiled == {(c, s) for c in ("date", "email", "person", "enum50") for s in ("hf_accel", *peers)}

    masked = {(r["batch"], r["side"]): float(r["cpu"]) for r in rows["mask"]}
    sides = [
        "masked_fill",
        "masked_fill_",
        "hf_accel",
        "hf_accel in place",
        "hf_accel advance only",
        "hf_accel processor",
    ]
    sides += [f"outlines ({p})" for p in peers if _installed("outlines")]
    sides += ["xgrammar.contrib.hf"] if "xgrammar" in peers else []
    assert set(masked) == {(batch, side) for batch in ("1", "3") for side in sides}
    assert all(seconds > 0 for seconds in masked.values())

    steps = {(r["batch"], r["side"]) for r in rows["generation"] if r["metric"] == "a step, ms"}
    assert steps == {(b, s) for b in ("1", "4") for s in ("free", "any text", "long strings")}
    assert sum(r["metric"].startswith("mask and advance") for r in rows["generation"]) == 4

    def of(metric: str) -> dict[str, float]:
        return {r["side"]: float(r["cpu"]) for r in rows["json"] if r["metric"] == metric}

    processors = {f"HF generate, {side}" for side in sides[5:]}
    assert {"hf_accel", "hf_accel free", "HF generate free", *processors} <= set(of("ms a token"))
    equal = of("share of outputs equal to hf_accel's")
    assert set(equal) >= processors
    assert all(
        share == 1 for arm, share in equal.items() if "hf_accel" in arm
    )  # llguidance forces tokens of its own choice
    passes = of("forward passes x rows, a token")
    assert all(passes[f"HF generate{arm}"] >= 1 for arm in (" free", ", hf_accel processor"))
    assert 0 < passes["hf_accel"] <= passes.get("hf_accel without jumps", passes["HF generate, hf_accel processor"])


def test_clock_of_constraints_counts_and_lets_go() -> None:
    import torch

    from benchmarks.structured_parts.generation import constraint_clock
    from hf_accel.engine.constraints import ConstrainedRows

    before = dict(vars(ConstrainedRows))
    with constraint_clock() as spent:
        assert spent.wall == 0
        assert ConstrainedRows.among([], [], torch.device("cpu")) is None
    assert spent.wall > 0 and spent.cpu > 0
    assert dict(vars(ConstrainedRows)) == before


def test_peers_that_are_absent_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import results, structured

    monkeypatch.setattr(structured, "version", lambda package: "")
    options = ["--smoke", "--sections", "compile", "mask", "--cases", "person", "--out", str(tmp_path)]
    assert structured.main(options) == 0
    said = capsys.readouterr().out
    for peer in ("outlines_core", "xgrammar", "llguidance", "outlines"):
        assert f"{peer} is not installed: left out" in said
    assert {r["side"] for r in results.read(tmp_path / "structured_compile.csv")} == {"hf_accel"}
    assert all("outlines" not in r["side"] for r in results.read(tmp_path / "structured_mask.csv"))
    with pytest.raises(SystemExit):
        structured.main([*options, "--peers", "xgrammar"])


def test_cases_allow_their_own_texts() -> None:
    import jsonschema

    from benchmarks.structured_parts.cases import CASES

    for case in CASES.values():
        for text in case.instances(20):
            if case.kind == "regex":
                assert re.fullmatch(case.value, text), (case.name, text)
            else:
                jsonschema.validate(json.loads(text), case.value)
        assert case.instances(3) == case.instances(3)


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    from benchmarks.structured_parts import vocabularies

    texts = ['{"name": "Alice", "year": 20261}\n', "naïve 数 🦊 def f(x):\n\treturn x"]
    made = {n: vocabularies.load(n, tmp_path, 600, 60_000, [ROOT / "benchmarks"]) for n in (300, 600)}
    for size, tokenizer in made.items():
        assert len(tokenizer) == size
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text and max(ids) < size
    small, large = ({v: k for k, v in t.get_vocab().items()} for t in made.values())
    assert small == {i: large[i] for i in range(300)}
    assert made[300].eos_token_id == made[600].eos_token_id
    alone = vocabularies.load(300, tmp_path, 300, 60_000, [ROOT / "benchmarks"])
    assert {v: k for k, v in alone.get_vocab().items()} == small  # as if it had been trained by itself
    with pytest.raises(ValueError, match="use smaller"):
        vocabularies.cut(json.loads(made[300].backend_tokenizer.to_str()), 301)
