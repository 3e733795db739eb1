"""The CUDA operators on a device."""

from __future__ import annotations

import pytest

from mswift.kernels import cuda
from tests.gpu.checks import CHECKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=f"CUDA kernels: {cuda.missing()}")]


@pytest.mark.parametrize("name", CHECKS)
def test_operators_on_a_device(name: str) -> None:
    CHECKS[name](cuda.library(), "cuda")
