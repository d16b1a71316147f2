"""The side-by-side demo: its measurement, what it calls a near tie, and that it would notice a wrong answer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import hf_accel
from hf_accel.demo import compare, report
from hf_accel.demo.compare import Comparison, DemoOptions, Divergence, Measured
from hf_accel.demo.model import load, shipped_model
from hf_accel.demo.prompts import Workload, workloads

OPTIONS = DemoOptions(max_new_tokens=6, num_prompts=3, threads=1)


@pytest.fixture(scope="module")
def shipped():
    return load(None)


def test_demo_runs_and_agrees(capsys):
    assert compare.main(OPTIONS) == 0
    text = capsys.readouterr().out
    assert "identical: 6/6 prompts" in text
    assert text.count("prefix hit rate") == 2
    assert text.count("hf-accel ") >= 2


def test_shared_prefix_is_reused(shipped):
    model, tokenizer = shipped
    result = compare.compare(model, tokenizer, OPTIONS)[0]
    assert result.hit_rate > 0.5
    assert result.num_fallbacks == 0
    assert result.num_identical == 3
    assert not hf_accel.is_patched(model)


def test_bfloat16_differs_at_near_ties_only(shipped):
    model, tokenizer = load(None, torch.bfloat16)
    results = compare.compare(model, tokenizer, dataclasses.replace(OPTIONS, max_new_tokens=24, num_prompts=4))
    assert all(compare.acceptable(result, "bfloat16") for result in results)


def test_workloads_follow_the_seed_and_the_context(shipped):
    tokenizer = shipped[1]
    shared, mixed = workloads(tokenizer, 5, 900, seed=1)
    assert workloads(tokenizer, 5, 900, seed=1) == [shared, mixed]
    assert workloads(tokenizer, 5, 900, seed=2) != [shared, mixed]
    first, second = shared.prompts[:2]
    common = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert common > 300
    assert len({len(p) for p in mixed.prompts}) > 1
    short, _ = workloads(tokenizer, 5, 40, seed=1)
    assert [p[-40:] for p in shared.prompts] == short.prompts


def test_a_wrong_token_is_found_and_judged(shipped):
    model, tokenizer = shipped
    runner = compare._Runner(model, tokenizer, 5)
    prompt = tokenizer("Q: What does os.walk do?\nA:")["input_ids"]
    right = runner.run([prompt])[0]
    wrong = [*right[:2], (right[2] + 1) % 4096, *right[3:]]
    found = runner.divergences([prompt] * 3, Measured([right] * 3, 1.0), Measured([right, wrong, right[:3]], 1.0))
    assert [(d.prompt, d.position) for d in found] == [(1, 2), (2, 3)]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + right[:2]])).logits[0, -1]
    assert found[0].tokens == (right[2], wrong[2])
    assert found[0].logits == pytest.approx((float(logits[right[2]]), float(logits[wrong[2]])))
    assert not found[0].near_tie
    assert math.isinf(found[1].num_steps)
    workload = Workload("w", [prompt] * 3)
    result = Comparison(workload, Measured([right], 1.0), Measured([right], 1.0), Measured([wrong], 0.5), 0.0, 0, found)
    assert not compare.acceptable(result, "bfloat16")
    assert "THE ANSWERS DIFFER" in report.verdict([result], fine=False)
    assert "not a near tie" in report.table(result, exact=False)


def test_rounding_steps_are_those_of_the_size():
    near = Divergence(0, 0, (1, 2), (16.0, 16.25), num_steps=2.0)
    assert near.near_tie
    assert not dataclasses.replace(near, num_steps=5.0).near_tie


def test_loading_errors_say_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no folder"):
        load(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"without a config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="could not load"):
        load(str(tmp_path))
    monkeypatch.setattr("hf_accel.demo.model.SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"hf_accel\.demo\.train"):
        shipped_model()
