"""Finds and loads the model of the demo: the shipped one, a folder, or a hub id. Says in plain words what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

SHIPPED = Path(__file__).resolve().parent.parent / "demo_model"


def shipped_model() -> Path:
    """Folder of the model that ships with the package.

    Raises:
        ValueError: it is not there; the message says how to make one.
    """
    if not (SHIPPED / "model.safetensors").exists():
        raise ValueError(
            f"the demo model is missing from {SHIPPED}: install the package again, or train one with "
            "`python -m hf_accel.demo.train --out FOLDER` and pass --model FOLDER"
        )
    return SHIPPED


def load(name: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        name: a folder, a hub id, or None for the shipped model.
        dtype: what the weights are converted to.

    Returns:
        The model, in evaluation mode, on the GPU if there is one, and the tokenizer.

    Raises:
        ValueError: nothing usable is there; the message says what was tried.
    """
    source = str(shipped_model()) if name is None else name
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{source} is a folder without a config.json: give one written by save_pretrained")
        source = str(path)
    elif path.is_absolute() or source.startswith(("./", "../", "~")) or source.count("/") > 1:
        raise ValueError(f"there is no folder {source}")
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"could not load {source!r} as a causal language model: {reason}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars for loading a few tensors."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
