"""The CUDA library as the execution model of csrc/emu runs it: it takes the tensors of a CPU for those of a device."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch

from mswift.kernels import cuda, cuda_operators
from tests.unit.csrc.emulator import COUNTERS, build


class Emulated(cuda.Library):
    """Counts what was started on it."""

    def __init__(self) -> None:
        if shutil.which("g++") is None:
            pytest.skip("no g++: the execution model cannot be compiled")
        self.model = ctypes.CDLL(str(build()))
        self.model.emu_configure(ctypes.c_uint(0), ctypes.c_int(0))
        self.model.emu_forget()
        super().__init__(self.model, lambda device: contextlib.nullcontext())

    def launches(self) -> int:
        values = (ctypes.c_long * len(COUNTERS))()
        self.model.emu_counters(values)
        return dict(zip(COUNTERS, values))["launches"]


@contextlib.contextmanager
def on_cpu(library: Emulated) -> Iterator[Emulated]:
    """Within, the operators run these kernels where they would run those for the CPU: the same dispatch as on a device, one key aside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        kernels = cuda_operators.install(lambda: library, "CPU")
    try:
        yield library
    finally:
        kernels._destroy()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The distance of two tensors beside the size of the second."""
    return float(((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-6)).detach())
