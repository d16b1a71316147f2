"""The coverage benchmark tells right from wrong, and what each engine takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("llguidance")
ROOT = Path(__file__).parent.parent

TREE = {"type": "object", "properties": {"kids": {"items": {"$ref": "#"}}}, "additionalProperties": False}
CASES = {
    "plain": ({"type": "integer"}, [(1, True), ("a", False)]),
    "recursive": (TREE, [({"kids": [{"kids": []}]}, True), ({"kids": [{"x": 1}]}, False)]),
    "none": ({"$dynamicRef": "#a"}, [([1, 2], True)]),
    "mislabelled": ({"type": "string"}, [("a", False), (1, True)]),
}


def test_engines_on_small_schemas(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.schema_coverage import ENGINES, Bench, cases, row

    for name, (schema, tests) in CASES.items():
        marked = [{"data": data, "valid": valid} for data, valid in tests]
        (tmp_path / f"{name}.json").write_text(json.dumps({"schema": schema, "tests": marked}))
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    assert sorted(p.stem for p in cases(tmp_path, 10, 0)) == sorted(CASES)
    assert len(cases(tmp_path, 2, 0)) == 2
    bench = Bench()
    found = {
        engine: {n: bench.check(engine, json.loads((tmp_path / f"{n}.json").read_text())) for n in CASES}
        for engine in ENGINES
    }
    for engine in ENGINES:
        assert found[engine]["mislabelled"]["accepted"] == found[engine]["mislabelled"]["rejected"] == 1
        assert "$dynamicRef" in found[engine]["none"]["refused"]
        assert ("refused" in found[engine]["recursive"]) == (engine == "automata")
        line = row(engine, list(found[engine].values()), "", "")
        assert line["fully_right"] == (1 if engine == "automata" else 2) and line["some_invalid_accepted"] == 1
    assert [found[e]["plain"]["dynamic"] for e in ENGINES] == [False, True, False, True]
    assert found["both"]["recursive"]["dynamic"]
