"""The library of csrc/cuda, loaded only where there is a device; MSWIFT_CUDA=0 leaves it alone, MSWIFT_CUDA=1 insists on it.

Its functions on tensors are in cuda_head, cuda_linear and cuda_rows: they allocate, pass pointers and check the returned code; gradients and
shapes for tracing belong to the operators, whose kernels on a device `cuda_operators` makes them. bf16 for everything with a matrix product,
fp32 or bf16 for the rest; sums are in fp32 and in a fixed order.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mswift.errors import ConfigError
from mswift.kernels import cuda_abi as abi
from mswift.kernels import cuda_build, extension
from mswift.log import get_logger

logger = get_logger(__name__)

_FOLDER = Path(__file__).resolve().parent / "lib"


class Library:
    """One loaded library. `on` makes a device the current one and gives the stream on which kernels are started there."""

    def __init__(self, library: ctypes.CDLL, on: Callable[[torch.device], AbstractContextManager[int | None]]) -> None:
        self._functions, self._on = abi.functions(library), on
        self._explain: Any = library.mswift_cuda_error
        self._explain.restype = ctypes.c_char_p

    def call(self, name: str, like: Tensor, *arguments: Any) -> None:
        """Tensors and structures stand for pointers. Raises RuntimeError with the library's words for the code."""
        plain = [pointer(argument) if isinstance(argument, Tensor | ctypes.Structure) else argument for argument in arguments]
        with self._on(like.device) as stream:
            code = self._functions[name](*plain, stream)
        if code:
            raise RuntimeError(f"{name} on {like.device}: {self._explain(code).decode()} (code {code})")

    def ask(self, name: str, like: Tensor, *arguments: int) -> int:
        """A function that answers with a number and starts nothing."""
        with self._on(like.device):
            return self._functions[name](*arguments)


def pointer(value: Tensor | ctypes.Structure | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, ctypes.Structure):
        return ctypes.addressof(value)
    assert value.is_contiguous(), "kernels take dense tensors; the operators see to it"
    return value.data_ptr()


def dtype_of(tensor: Tensor) -> int:
    return abi.DTYPES[str(tensor.dtype).removeprefix("torch.")]


@functools.cache
def _stale() -> str | None:
    return cuda_build.stale(_FOLDER)


@functools.cache
def _tell(reason: str) -> str:
    logger.warning("the CUDA kernels are not in use (%s); plain torch is, which is slower and gives the same results", reason)
    return reason


def _not_built() -> str | None:
    """What somebody may want to mend."""
    if not (_FOLDER / cuda_build.LIBRARY).is_file():
        return "they were not built: install with nvcc on PATH or CUDA_HOME set"
    return _stale()


def missing() -> str | None:
    """Why the CUDA kernels cannot be used here; None: they can. What somebody may want to mend is told once.

    Raises:
        ConfigError: they cannot, and MSWIFT_CUDA=1 asks for them.
    """
    if os.environ.get("MSWIFT_CUDA") == "0":
        return "MSWIFT_CUDA=0"
    demand()
    if not torch.cuda.is_available():
        return "no CUDA device"
    reason = _not_built()
    return _tell(reason) if reason else None


def demand() -> None:
    """See to it that what MSWIFT_CUDA=1 asks for is there.

    Raises:
        ConfigError: there is no device, or the kernels are missing or of other sources.
    """
    if os.environ.get("MSWIFT_CUDA") != "1":
        return
    reason = extension.missing() or _not_built() or (None if torch.cuda.is_available() else "no CUDA device")
    if reason:
        raise ConfigError(f"MSWIFT_CUDA=1: the CUDA kernels cannot run here ({reason}); unset MSWIFT_CUDA to go on without them")


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[int | None]:
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@functools.cache
def library() -> Library:
    """The library of this installation; ask `missing` first."""
    return Library(ctypes.CDLL(str(_FOLDER / cuda_build.LIBRARY)), _on)
