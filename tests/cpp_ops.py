"""For tests that ask for the C++ ops by name: skipped where there are none (no compiler, or switched off)."""

from __future__ import annotations

import pytest

from hf_accel_kernels.cpu import library

needs_cpp_ops = pytest.mark.skipif(library.load()[0] is None, reason=f"no C++ ops here: {library.load()[1]}")
