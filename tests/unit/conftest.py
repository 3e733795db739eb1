"""A world of one process, for tests whose code asks which rank it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def world_of_one() -> Iterator[None]:
    """Joined once: what outlives a test, such as a loaded model, keeps its process groups."""
    from mswift.runtime.device import init_processes, leave_processes, select

    init_processes(select("cpu"))
    yield
    leave_processes()
