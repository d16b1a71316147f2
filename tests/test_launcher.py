"""`hf-accel run`: unchanged scripts, accelerated; what they print, raise and return stays theirs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from hf_accel import launcher
from hf_accel.demo.model import shipped_model

GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
inputs = tokenizer("Q: What does os.walk do?\\nA:", return_tensors="pt")
print(model.generate(**inputs, do_sample=False, max_new_tokens=8)[0].tolist())
"""


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def python(*args, **kwargs):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, **kwargs)


def accelerated(*args, **kwargs):
    return python("-m", "hf_accel", "run", *args, **kwargs)


def test_same_output_as_python_and_the_engine_did_it(script):
    path, model = script(GENERATE), str(shipped_model())
    expected = python(path, model)
    got = accelerated("--stats", "--set", "page_size=8", path, model)
    assert expected.returncode == got.returncode == 0, got.stderr
    assert got.stdout == expected.stdout
    assert "LlamaForCausalLM" in got.stderr
    generated = next(line for line in got.stderr.splitlines() if "num_generated_tokens" in line)
    assert int(generated.split()[-1]) == 8


def test_everything_that_loads_is_patched(script, capsys):
    path = script("""
        import sys, hf_accel
        from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline
        path = sys.argv[1]
        by_auto, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        by_class = LlamaForCausalLM.from_pretrained(path)
        by_pipeline = pipeline("text-generation", model=path).model
        made = LlamaForCausalLM(by_auto.config)
        print([hf_accel.is_patched(m) for m in (by_auto, by_class, by_pipeline, made)], sorted(info)[:1])
    """)
    assert launcher.run(path, [str(shipped_model())]) == 0
    assert capsys.readouterr().out.startswith("[True, True, True, False]")


def test_loading_is_put_back(script):
    from transformers import PreTrainedModel

    before = PreTrainedModel.__dict__["from_pretrained"]
    assert launcher.run(script("import transformers.modeling_utils\n1 / 0"), []) == 1
    assert PreTrainedModel.__dict__["from_pretrained"] is before


def test_unsupported_model_runs_on_with_one_line(script, tmp_path):
    path = script("""
        import sys, torch
        from transformers import T5Config, T5ForConditionalGeneration
        T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32,
            decoder_start_token_id=0)).save_pretrained(sys.argv[1])
        model = T5ForConditionalGeneration.from_pretrained(sys.argv[1])
        print(model.generate(torch.tensor([[3, 4, 1]]), max_new_tokens=3).shape[0])
    """)
    result = accelerated(path, str(tmp_path / "t5"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1"
    assert result.stderr.count("runs unaccelerated") == 1


def test_script_sees_what_python_would_give_it(script, tmp_path):
    (tmp_path / "beside.py").write_text("value = 7")
    path = script("""
        import os, sys
        assert "transformers" not in sys.modules and "torch" not in sys.modules  # its environment variables still count
        import beside
        print(__name__, sys.argv, sys.path[0], beside.value, os.path.basename(__file__), sys.modules["__main__"].beside.value)
    """)
    arguments = [path, "--stats", "-m", "x", "--", "--set", "a"]
    plain = python(*arguments, cwd="/")
    assert plain.returncode == 0
    result = accelerated(*arguments, cwd="/")
    assert result.stdout == plain.stdout


@pytest.mark.parametrize(
    ("body", "code"), [("raise SystemExit(3)", 3), ("import sys; sys.exit('bye')", 1), ("pass", 0)]
)
def test_exit_codes(script, body, code):
    result = accelerated(script(body))
    assert result.returncode == code
    assert ("bye" in result.stderr) == ("bye" in body)


def test_traceback_is_the_scripts_own(script):
    path = script("def f():\n    raise KeyError('gone')\nf()\n")
    plain, ours = python(path), accelerated(path)
    assert ours.returncode == plain.returncode == 1
    assert ours.stderr == plain.stderr
    broken = script("def f(:\n", "broken.py")
    assert accelerated(broken).stderr == python(broken).stderr


def test_module_as_python_does(tmp_path):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tool.py").write_text("import sys, pkg\nprint(__name__, __package__, sys.argv[1:], sys.path[0])")
    assert (
        accelerated("-m", "pkg.tool", "--x", "1", cwd=tmp_path).stdout
        == python("-m", "pkg.tool", "--x", "1", cwd=tmp_path).stdout
    )
    missing = accelerated("-m", "no_such_module_at_all", cwd=tmp_path)
    assert missing.returncode == 1
    assert "no_such_module_at_all" in missing.stderr


def test_no_such_script():
    result = accelerated("/nowhere/at_all.py")
    assert result.returncode == 2
    assert "no such script" in result.stderr
    assert "Traceback" not in result.stderr
