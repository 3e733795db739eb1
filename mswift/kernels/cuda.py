"""The library of csrc/cuda, loaded only where there is a device; MSWIFT_CUDA=0 leaves it alone.

Its functions on tensors are in cuda_head, cuda_linear and cuda_rows: they allocate, pass pointers and check the returned code; gradients and
shapes for tracing belong to the operators. bf16 for everything with a matrix product, fp32 or bf16 for the rest; sums are in fp32 and in a
fixed order.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi

_LIBRARY = Path(__file__).resolve().parent / "lib" / "libmswift_cuda.so"


class Library:
    """One loaded library; `stream` gives the stream of a device on which they are started."""

    def __init__(self, library: ctypes.CDLL, stream: Callable[[torch.device], int | None]) -> None:
        self._functions, self._stream = abi.functions(library), stream
        self._explain: Any = library.mswift_cuda_error
        self._explain.restype = ctypes.c_char_p

    def call(self, name: str, like: Tensor, *arguments: Any) -> None:
        """Tensors and structures stand for pointers. Raises RuntimeError with the library's words for the code."""
        plain = [pointer(argument) if isinstance(argument, Tensor | ctypes.Structure) else argument for argument in arguments]
        code = self._functions[name](*plain, self._stream(like.device))
        if code:
            raise RuntimeError(f"{name} on {like.device}: {self._explain(code).decode()} (code {code})")


def pointer(value: Tensor | ctypes.Structure | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, ctypes.Structure):
        return ctypes.addressof(value)
    assert value.is_contiguous(), "kernels take dense tensors; the operators see to it"
    return value.data_ptr()


def dtype_of(tensor: Tensor) -> int:
    return abi.DTYPES[str(tensor.dtype).removeprefix("torch.")]


def missing() -> str | None:
    """Why the CUDA kernels cannot be used here; None: they can."""
    if os.environ.get("MSWIFT_CUDA") == "0":
        return "MSWIFT_CUDA=0"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if _LIBRARY.is_file() else "they were not built: install with nvcc on PATH or CUDA_HOME set"


@functools.cache
def library() -> Library:
    """The library of this installation; ask `missing` first."""
    return Library(ctypes.CDLL(str(_LIBRARY)), lambda device: torch.cuda.current_stream(device).cuda_stream)
