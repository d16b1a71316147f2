"""Rules of the layout that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "hf_accel", ROOT / "kernels" / "hf_accel_kernels")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
POLICY = [
    "hf_accel",
    "hf_accel.config",
    "hf_accel.sampling_params",
    "hf_accel.request",
    "hf_accel.scheduler",
    "hf_accel.scheduler.output",
    "hf_accel.scheduler.policy",
    "hf_accel.scheduler.scheduler",
    "hf_accel.kv_cache",
    "hf_accel.kv_cache.allocator",
    "hf_accel.kv_cache.eviction_queue",
    "hf_accel.kv_cache.holdings",
    "hf_accel.kv_cache.integrity",
    "hf_accel.kv_cache.manager",
    "hf_accel.kv_cache.prefix_match",
    "hf_accel.kv_cache.radix",
    "hf_accel.kv_cache.radix_node",
]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_sources_are_found():
    assert len(SOURCES) > 20


def test_kernels_folder_is_not_a_package():
    """It would shadow HuggingFace's distribution `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_policy_needs_no_torch():
    code = f"""
import importlib, sys
for name in {POLICY!r}:
    importlib.import_module(name)
heavy = {{"torch", "transformers", "numpy", "hf_accel_kernels"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_source_file(path: Path):
    text = path.read_text(encoding="utf-8")
    assert path.stem not in ("utils", "helpers", "common", "misc"), "name a file by what it owns"
    assert text.count("\n") <= MAX_FILE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not tree.body, "a module says what it owns"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            documentation = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert length - documentation <= MAX_FUNCTION_LINES, f"{node.name} has {length - documentation} lines"


@pytest.mark.parametrize(("library", "home"), [("triton", "triton_ops"), ("flashinfer", "flashinfer")])
def test_gpu_libraries_are_imported_in_one_place(library: str, home: str):
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == library for name in names):
                assert home in str(path), f"{_name(path)} imports {library}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=_name)
def test_test_file(path: Path):
    assert path.read_text(encoding="utf-8").count("\n") <= MAX_FILE_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=_name)
def test_example_is_short(path: Path):
    assert path.read_text(encoding="utf-8").count("\n") <= 40


def test_readme_is_short_and_its_test_command_is_what_ci_runs():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README yet")
    text = readme.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("python3 -m venv")]
    assert len(commands) == 2, "one command for the demo, one for the tests"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert commands[1] in ci.replace("pip install -q", "pip install")


def test_every_dependency_range_contains_the_constraint():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert set(pins) >= {"torch", "transformers"}
    for name, version in pins.items():
        lowest = re.search(rf'"{name}>=([\d.]+)', project)
        assert lowest, name
        assert tuple(map(int, version.split("."))) >= tuple(map(int, lowest[1].split(".")))
