"""The text the demo model learns from: what every Python installation ships. Knows neither torch nor transformers.

Three kinds of document are made: reference pages (`pydoc_data.topics`, the licence), the docstrings of the standard
library's modules as `help()` would show them, and question-and-answer pages over the same docstrings, some as plain
"Q: ... A: ..." lines (the shape of a few-shot prompt), some as chats.
"""

from __future__ import annotations

import ast
import os
import random
from dataclasses import dataclass
from pathlib import Path

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    | {"distutils", "idlelib", "lib2to3", "pydoc_data"}
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ':\\n' + message['content'] | trim + '\\n\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""The chat form of the model: `role:`, the text, an empty line; an assistant's turn ends with eos."""


@dataclass(frozen=True)
class Entry:
    """One documented thing: `json.dumps`, its signature line and its docstring."""

    name: str
    signature: str
    doc: str

    @property
    def summary(self) -> str:
        """First paragraph of the docstring on one line, at most 300 characters, cut after a sentence if it must be."""
        text = " ".join(self.doc.split("\n\n")[0].split())
        return text if len(text) <= 300 else text[: text.rfind(". ", 0, 300) + 1]


def documents(seed: int = 0, library: Path | None = None) -> list[str]:
    """All documents in an order drawn from `seed`.

    Args:
        library: folder of the standard library; None: the running interpreter's.
    """
    rng = random.Random(seed)
    root = library or Path(os.__file__).parent
    modules = [(name, entries) for name, entries in standard_library(root) if entries]
    pages = reference_pages(root)
    pages += ["\n\n\n".join(f"{e.signature}\n    {e.doc}" for e in entries) for _, entries in modules]
    pages += question_pages([e for _, entries in modules for e in entries], rng)
    rng.shuffle(pages)
    return pages


def reference_pages(root: Path) -> list[str]:
    """The language reference that `help()` shows, and the licence where it is installed."""
    from pydoc_data.topics import topics

    pages = [text.strip() for _, text in sorted(topics.items())]
    licence = root / "LICENSE.txt"
    return [*pages, licence.read_text(encoding="utf-8")] if licence.exists() else pages


def standard_library(root: Path) -> list[tuple[str, list[Entry]]]:
    """Every module of the standard library, in path order, with its documented modules, classes and functions."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found.append((name, _entries(tree, name)))
    return found


def _entries(node: ast.AST, name: str) -> list[Entry]:
    entries = []
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc and len(doc) > 20:
            entries.append(Entry(name, _signature(node, name), doc.replace("\n", "\n    ").replace("    \n", "\n")))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            entries += _entries(child, f"{name}.{child.name}")
    return entries


def _signature(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return f"class {name}" if isinstance(node, ast.ClassDef) else f"module {name}"


def question_pages(entries: list[Entry], rng: random.Random) -> list[str]:
    """Each entry once as a line of a question page (6 to 14 questions a page), and half of them as a chat."""
    entries = [entry for entry in entries if len(entry.summary) > 20]
    rng.shuffle(entries)
    pages, start = [], 0
    while start < len(entries):
        chunk = entries[start : start + rng.randint(6, 14)]
        start += len(chunk)
        pages.append("\n\n".join(f"Q: What does {e.name} do?\nA: {e.summary}" for e in chunk) + "\n")
    for e in entries[::2]:
        pages.append(f"user:\nWhat does {e.name} do?\n\nassistant:\n{e.summary}\n\n")
    return pages
