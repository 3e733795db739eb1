"""Which kernels the tests of this folder run with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mswift.kernels import choice

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session", autouse=True)
def graphs_of_these_sources() -> Iterator[None]:
    """torch finds a compiled graph by its forward part alone: one kept from before a change would call gradients as they were then."""
    sources = [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "mswift" / "kernels").glob("*.py"))]
    digest = hashlib.sha256("".join(path.read_text(encoding="utf8") for path in sources).encode()).hexdigest()[:16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / f"graphs-{digest}"))
        yield


@pytest.fixture
def auto_kernels() -> Iterator[None]:
    """Compiled kernels where they win, until a test chooses others; afterwards what was chosen before."""
    before = choice.selected()
    choice.select("auto")
    yield
    choice.select(before)
