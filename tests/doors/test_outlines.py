"""outlines on a patched model, as its users write it: its output types run on our masks, and outlines is left as it was found."""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
import typing

import pytest
import torch

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.patching import outlines_hook
from hf_accel.structured.logits_processor import ConstraintLogitsProcessor, RegexLogitsProcessor

outlines = pytest.importorskip("outlines")
pydantic = pytest.importorskip("pydantic")
from outlines import backends  # noqa: E402
from outlines.generator import SteerableGenerator  # noqa: E402
from outlines.processors import OutlinesLogitsProcessor  # noqa: E402
from outlines.types import CFG, Choice, JsonSchema, Regex  # noqa: E402

OWN_INIT = getattr(SteerableGenerator.__init__, "__wrapped__", SteerableGenerator.__init__)


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=6)
    age: int = pydantic.Field(ge=0, le=99)


@pytest.fixture
def no_index(monkeypatch):
    """outlines must compile nothing itself."""

    def refuse(name, model):
        raise AssertionError("outlines compiles a processor of its own")

    monkeypatch.setattr(backends, "_get_backend", refuse)


def check_person(text: str) -> None:
    person = Person.model_validate_json(text)
    assert list(json.loads(text)) == ["name", "age"] and 0 <= person.age <= 99


@pytest.mark.usefixtures("no_index")
def test_unchanged_calls(model, tokenizer):
    hf_accel.patch(model)
    wrapped = outlines.from_transformers(model, tokenizer)
    check_person(wrapped("def f(", Person, max_new_tokens=60, do_sample=False))
    for text in wrapped.batch(["def f(", "class"], Person, max_new_tokens=60, do_sample=True, temperature=3.0):
        check_person(text)
    assert wrapped("x", typing.Literal["red", "blue"], max_new_tokens=9) in ("red", "blue")
    people = wrapped("x", typing.List[Person], max_new_tokens=400, do_sample=False)  # noqa: UP006
    assert [Person(**p) for p in json.loads(people)] if people.endswith("]") else people.startswith('[{"name"')
    assert re.fullmatch("[a-z]{3}7", wrapped("x", outlines.regex("[a-z]{3}") + "7", max_new_tokens=9))
    assert hf_accel.get_engine(model).stats().num_fallbacks == 0


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize("backend", [None, "outlines_core", "llguidance", "xgrammar"])
def test_generators_of_every_backend(model, tokenizer, backend):
    with hf_accel.patch(model):
        generator = outlines.Generator(outlines.from_transformers(model, tokenizer), Regex(r"[a-c]{2}\.[0-9]"), backend)
        assert isinstance(generator.logits_processor, ConstraintLogitsProcessor)
        found = {generator("def", max_new_tokens=2, do_sample=False) for _ in range(2)}
        assert len(found) == 1, "each call begins anew, though the one before was cut"
        many = generator("def", max_new_tokens=9, num_return_sequences=3, do_sample=True, temperature=9.0)
        assert all(re.fullmatch(r"[a-c]{2}\.[0-9]", text) for text in many)
    again = generator("def", max_new_tokens=9, do_sample=False)  # unpatched, the generator lives on
    assert re.fullmatch(r"[a-c]{2}\.[0-9]", again)


def test_same_answer_through_every_door(model, tokenizer):
    options = {"max_new_tokens": 60, "do_sample": False}
    wrapped = outlines.from_transformers(model, tokenizer)
    prompt = wrapped.type_adapter.format_input("def animal(")  # by the chat template
    inputs = tokenizer(prompt, return_tensors="pt")
    with hf_accel.patch(model):
        text = wrapped("def animal(", Person, **options)
        row = model.generate(**inputs, json_schema=Person, tokenizer=tokenizer, **options)[
            0, inputs.input_ids.shape[1] :
        ]
        assert tokenizer.decode(row, skip_special_tokens=True) == text
    engine = Engine(model, tokenizer, num_pages=64)
    for asked in ({"json_schema": JsonSchema(Person)}, {"constraint": JsonSchema(Person)}, {"constraint": Person}):
        output = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=60, **asked))[0]
        assert output.outputs[0].text == text
    for asked in ({"regex": Regex("a|b")}, {"choice": Choice(["a", "b"])}, {"constraint": Choice(["a", "b"])}):
        assert engine.generate("x", SamplingParams(temperature=0, **asked))[0].outputs[0].text in ("a", "b")


def test_whole_characters_and_no_special_tokens(model, tokenizer):
    """outlines' own masks let halves of characters and special tokens through."""
    with hf_accel.patch(model):
        generator = outlines.Generator(outlines.from_transformers(model, tokenizer), Regex(r"[^\n]{3,8}"))
        ids = tokenizer("def", return_tensors="pt").input_ids
        rows = model.generate(
            ids,
            logits_processor=[generator.logits_processor],
            max_new_tokens=40,
            do_sample=True,
            temperature=5.0,
            top_k=0,
            num_return_sequences=32,
        )[:, ids.shape[1] :].tolist()
    ended = [row[: row.index(tokenizer.eos_token_id)] for row in rows if tokenizer.eos_token_id in row]
    assert len(ended) > 20
    for row in ended:
        assert not set(row) & set(tokenizer.all_special_ids) and max(row) < len(tokenizer)
        text = tokenizer.decode(row)
        assert re.fullmatch(r"[^\n\ufffd]{3,8}", text)


def test_what_we_refuse_is_left_to_outlines_with_a_word(model, tokenizer, caplog):
    hf_accel.patch(model)
    wrapped = outlines.from_transformers(model, tokenizer)
    with caplog.at_level(logging.WARNING, logger="hf_accel"):
        generator = outlines.Generator(wrapped, Regex("a++b"))
    assert "outlines' own processor" in caplog.text and "possessive" in caplog.text
    assert not isinstance(generator.logits_processor, ConstraintLogitsProcessor)
    with pytest.raises(ValueError, match="Backend nonsense not supported"):
        outlines.Generator(wrapped, Regex("a"), "nonsense")
    with pytest.raises(TypeError, match="not supported"):
        outlines.Generator(wrapped, complex(1, 2))
    assert outlines.Generator(wrapped).logits_processor is None


def test_grammars(model, tokenizer):
    pytest.importorskip("llguidance")
    with hf_accel.patch(model):
        wrapped = outlines.from_transformers(model, tokenizer)
        generator = outlines.Generator(wrapped, CFG('start: "(" start ")" | "x"'))
        if isinstance(generator.logits_processor, ConstraintLogitsProcessor):  # else outlines' own
            text = generator("x", max_new_tokens=30, do_sample=True, temperature=2.0)
            assert re.fullmatch(r"\(*x?\)*", text)


class Banning(OutlinesLogitsProcessor):
    """A processor of somebody else."""

    def process_logits(self, input_ids, logits):
        logits[:, 100:] = -torch.inf
        return logits


def test_processors_that_are_not_known_run_as_they_are(model, tokenizer):
    wrapped = outlines.from_transformers(model, tokenizer)
    other = outlines.Generator(wrapped, processor=Banning("torch"))
    expected = other("x", max_new_tokens=12, do_sample=False)
    with hf_accel.patch(model):
        assert other("x", max_new_tokens=12, do_sample=False) == expected
        ours = outlines.Generator(wrapped, processor=RegexLogitsProcessor("[cd]{4}", tokenizer))
        assert re.fullmatch("[cd]{4}", ours("x", max_new_tokens=12, do_sample=False))


def test_other_models_are_left_alone(model, tokenizer):
    from ..tiny import make_tiny_llama

    other = make_tiny_llama(vocab_size=len(tokenizer))
    with hf_accel.patch(model):
        generator = outlines.Generator(outlines.from_transformers(other, tokenizer), Regex("a"))
        assert not isinstance(generator.logits_processor, ConstraintLogitsProcessor)


@pytest.fixture
def untouched(monkeypatch):
    """No model is patched, whatever other tests keep alive."""
    monkeypatch.setattr(SteerableGenerator, "__init__", OWN_INIT)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, outlines_hook._Awaiter)])
    monkeypatch.setattr(outlines_hook, "_models", {})
    monkeypatch.setattr(outlines_hook, "_wrapped", [])


@pytest.mark.usefixtures("untouched")
def test_outlines_is_left_as_it_was_found(model, tokenizer):
    from ..tiny import make_tiny_llama

    other = hf_accel.patch(make_tiny_llama(vocab_size=len(tokenizer)))
    hf_accel.patch(model)
    assert SteerableGenerator.__init__ is not OWN_INIT
    hf_accel.unpatch(model)
    hf_accel.unpatch(model)
    assert SteerableGenerator.__init__ is not OWN_INIT
    del other
    gc.collect()
    assert SteerableGenerator.__init__ is OWN_INIT and not outlines_hook._wrapped and not outlines_hook._models


class _Model:
    pass


@pytest.fixture
def fake(tmp_path, monkeypatch, untouched):
    """A package that stands for outlines, not imported yet."""
    (tmp_path / "fakelines").mkdir()
    (tmp_path / "fakelines" / "__init__.py").write_text("from fakelines.generator import SteerableGenerator\n")
    (tmp_path / "fakelines" / "generator.py").write_text(
        "class SteerableGenerator:\n"
        "    def __init__(self, model, output_type, backend_name=None):\n"
        "        self.model, self.logits_processor = model, (output_type, backend_name)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(outlines_hook, "_MODULE", "fakelines.generator")
    yield
    for name in ("fakelines", "fakelines.generator"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("fake")
def test_outlines_may_be_imported_after_patching():
    model, finders = _Model(), list(sys.meta_path)
    outlines_hook.install(model, lambda m, kind: ("ours", kind) if m is model else None)
    import fakelines  # type: ignore[import-not-found]

    assert sys.meta_path == finders, "the import is not watched any longer"
    spec = sys.modules["fakelines.generator"].__spec__
    assert type(spec.loader).__module__ == "_frozen_importlib_external"
    assert fakelines.SteerableGenerator(model, "kind").logits_processor == ("ours", "kind")
    assert fakelines.SteerableGenerator(model, output_type="kind", backend_name=None).logits_processor == (
        "ours",
        "kind",
    )
    assert fakelines.SteerableGenerator(model, "kind", "mine").logits_processor == ("kind", "mine")
    assert fakelines.SteerableGenerator(_Model(), "kind").logits_processor == ("kind", None)
    assert fakelines.SteerableGenerator(model, None).logits_processor == (None, None)
    outlines_hook.uninstall(model)
    assert fakelines.SteerableGenerator(model, "kind").logits_processor == ("kind", None)
    assert fakelines.SteerableGenerator.__init__.__name__ == "__init__"
    assert not hasattr(fakelines.SteerableGenerator.__init__, "__wrapped__")


@pytest.mark.usefixtures("fake")
def test_unpatching_before_outlines_is_imported():
    model, finders = _Model(), list(sys.meta_path)
    outlines_hook.install(model, lambda m, kind: "ours")
    outlines_hook.install(model, lambda m, kind: "ours")
    assert len(sys.meta_path) == len(finders) + 1
    del model
    gc.collect()
    assert sys.meta_path == finders
    import fakelines

    assert fakelines.SteerableGenerator(1, "kind").logits_processor == ("kind", None)


@pytest.mark.usefixtures("fake")
def test_another_outlines_than_we_know(tmp_path, caplog):
    (tmp_path / "fakelines" / "generator.py").write_text("SteerableGenerator = None\n")
    model = _Model()
    outlines_hook.install(model, lambda m, kind: "ours")
    with caplog.at_level(logging.WARNING, logger="hf_accel"):
        import fakelines

        assert fakelines.SteerableGenerator is None
    assert "run as they are" in caplog.text
    outlines_hook.uninstall(model)
