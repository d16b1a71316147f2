"""Each way of asking."""

from __future__ import annotations

import pytest

from .ways import WAYS


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]
