"""The command line: what it accepts, what it says when asked wrongly, and its exit codes."""

from __future__ import annotations

import re

import pytest

import hf_accel
from hf_accel import cli, launcher
from hf_accel.demo import compare


def run(*argv):
    """Exit code of a command, whether returned or raised."""
    try:
        return cli.main(list(argv))
    except SystemExit as error:
        return error.code


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"hf-accel {hf_accel.__version__}"
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f"hf-accel {command}" in text for command in ("demo", "run", "env"))
    for command in ("demo", "run", "env"):
        assert run(command, "--help") == 0
        assert f"hf-accel {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required"),
        (["frobnicate"], "invalid choice"),
        (["run"], "name a script"),
        (["run", "--stats"], "name a script"),
        (["run", "/no/such/script.py"], "no such script: /no/such/script.py"),
        (["run", "--set", "page_size", "x.py"], "KEY=VALUE"),
        (["run", "--set", "page_sise=4", "x.py"], "page_sise"),
        (["run", "--set", "page_size=0", "x.py"], "page_size must be a positive integer"),
        (["run", "--set=policy=lottery", "x.py"], "policy must be one of"),
        (["demo", "--num-prompts", "0"], "at least 1"),
        (["demo", "--dtype", "int8"], "invalid choice"),
        (["demo", "--model", "/no/such/folder"], "no folder /no/such/folder"),
        (["demo", "--max-new-tokens", "5000"], "context is 1024 tokens"),
    ],
)
def test_wrong_requests_get_words_and_code_2(argv, words, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "own", "script"),
    [
        (["a.py"], ["a.py"], []),
        (["a.py", "--stats", "-m"], ["a.py"], ["--stats", "-m"]),
        (["--stats", "--set", "a=1", "a.py", "--set", "b"], ["--stats", "--set", "a=1", "a.py"], ["--set", "b"]),
        (["--set=a=1", "a.py", "x"], ["--set=a=1", "a.py"], ["x"]),
        (["-m", "pkg.mod", "--flag", "--", "y"], ["-m", "pkg.mod"], ["--flag", "--", "y"]),
        (["--stats", "--", "a.py", "--", "y"], ["--stats", "a.py"], ["--", "y"]),
        (["--stats"], ["--stats"], []),
        (["-m"], ["-m"], []),
    ],
)
def test_run_arguments_are_split_where_the_script_begins(arguments, own, script):
    assert cli.split_run_arguments(arguments) == (own, script)


def test_run_hands_everything_on(monkeypatch):
    calls = []
    monkeypatch.setattr(launcher, "run", lambda *args, **kwargs: calls.append((args, kwargs)) or 5)
    options = [
        "--set",
        "page-size=8",
        "--set",
        "enable_prefix_cache=false",
        "--set",
        "num_pages=none",
        "--set",
        "policy=fcfs",
    ]
    assert run("run", *options, "--stats", "-m", "pkg", "--set", "own") == 5
    config = {"page_size": 8, "enable_prefix_cache": False, "num_pages": None, "policy": "fcfs"}
    assert calls == [(("pkg", ["--set", "own"]), {"as_module": True, "engine_config": config, "show_stats": True})]


def test_demo_hands_everything_on(monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "main", lambda options: seen.append(options) or 1)
    argv = "demo --model m --dtype bfloat16 --max-new-tokens 3 --num-prompts 4 --threads 1 --seed 9"
    assert run(*argv.split()) == 1
    assert seen == [compare.DemoOptions("m", "bfloat16", 3, 4, 1, 9)]


def test_env_reports_the_installation(capsys):
    import torch
    import transformers

    assert run("env") == 0
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["transformers"] == transformers.__version__
    assert lines["hf-accel"] == hf_accel.__version__
    assert lines["C++ ops"].startswith(("built", "not built: "))
    assert {"python", "processor", "features", "threads", "GPU"} <= set(lines)
