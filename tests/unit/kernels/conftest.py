"""Which kernels the tests of this folder run with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mswift.kernels import choice


@pytest.fixture
def auto_kernels() -> Iterator[None]:
    """Compiled kernels where they win, until a test chooses others; afterwards what was chosen before."""
    before = choice.selected()
    choice.select("auto")
    yield
    choice.select(before)
