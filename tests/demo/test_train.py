"""Training of the demo model: the corpus, the tokenizer, a model that learns and that transformers can load."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_accel.demo import train
from hf_accel.demo.corpus import EOS, Entry, documents, question_pages, standard_library
from hf_accel.demo.model import shipped_model


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A standard library of two modules."""
    root = tmp_path_factory.mktemp("lib")
    (root / "test").mkdir()
    (root / "test" / "hidden.py").write_text('"""Not documentation, but a test of something."""')
    (root / "one.py").write_text(
        '"""The first module, which is documented."""\ndef f(a, *, b=1):\n    """Return the sum of a and b, both numbers."""\n'
    )
    (root / "broken.py").write_text("def (")
    return root


def test_corpus_reads_what_is_documented(library):
    entries = [e for _, found in standard_library(library) for e in found]
    assert [(e.name, e.signature) for e in entries] == [("one", "module one"), ("one.f", "one.f(a, *, b=1)")]
    texts = documents(3, library)
    assert texts == documents(3, library)
    assert sorted(texts) == sorted(documents(4, library))
    assert any("Q: What does one.f do?\nA: Return the sum of a and b, both numbers." in t for t in texts)
    assert any(t.startswith("user:\nWhat does one") for t in texts)


def test_summary_is_cut_after_a_sentence():
    entry = Entry("n", "n()", "First sentence here. " + "word " * 80 + "end.\n\nMore.")
    assert entry.summary == "First sentence here."
    assert question_pages([], __import__("random").Random(0)) == []


def test_learning_rate_warms_up_and_decays():
    rates = [train.learning_rate(p / 100) for p in range(101)]
    assert rates[0] < rates[2] < rates[3] == pytest.approx(train.PEAK_LR, rel=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(train.PEAK_LR / 20)


def test_training_learns_and_saves_a_loadable_model(tmp_path, monkeypatch, capsys):
    texts = ["the cat sat on the mat and the dog sat on the log. " * 60] * 12
    monkeypatch.setattr(train, "documents", lambda seed: texts)
    monkeypatch.setattr(train, "CONTEXT", 64)
    monkeypatch.setattr(train, "BATCH_TOKENS", 256)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)  # after every step
    out = tmp_path / "model"
    assert train.main(["--out", str(out), "--minutes", "5", "--steps", "12", "--threads", "1", "--float32"]) == 0
    assert float(capsys.readouterr().out.split("loss ")[1].split(";")[0]) < 4.5  # it starts at log(277) = 5.6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert tokenizer("the cat")["input_ids"][0] == tokenizer.bos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not (out / ".partial").exists()


def test_windows_come_from_the_stream(monkeypatch):
    tokenizer = train.train_tokenizer(["some words to learn from"] * 3, vocab_size=300)
    stream = train.Stream(["first text", "second, longer text"], tokenizer, seed=0)
    row = stream.ids.tolist()
    batch = stream.batch(num_tokens=30, length=5)
    assert batch.shape == (6, 5)
    assert all(any(row[i : i + 5] == window for i in range(len(row))) for window in batch.tolist())
    assert row[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="fewer than one window"):
        stream.batch(100, 1000)


@pytest.mark.parametrize(
    "text", ["json.dumps(obj, *, skipkeys=False)", "naïve — 漢字 🙂\n\ttabs", "<|bos|> literal", ""]
)
def test_shipped_tokenizer_round_trips(text):
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert (len(tokenizer), tokenizer.padding_side, tokenizer.model_max_length) == (4096, "left", 1024)


def test_shipped_model_writes_python_documentation():
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    model = AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.float32).eval()
    assert 5.0e6 < sum(p.numel() for p in model.parameters()) < 6.0e6
    text = "Return True if the object is a subclass of the class, otherwise return False."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
        nonsense = model(input_ids=shuffled, labels=shuffled).loss
    assert loss < 4.0 < nonsense


def test_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    chat = [
        {"role": "user", "content": " Hi? "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "More."},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == f"<|bos|>user:\nHi?\n\nassistant:\nYes.\n\n{EOS}user:\nMore.\n\nassistant:\n"
