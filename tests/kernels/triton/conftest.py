"""Tests of the Triton kernels: in the interpreter on a machine without a GPU, on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from . import interpreter

if not torch.cuda.is_available():
    interpreter.install()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
