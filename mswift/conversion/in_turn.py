"""Tensors that are read when their turn comes: how memory is given to them and taken back, and what the system is told of their files."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, Protocol

import torch

Advice = Literal["soon", "done"]
"""Of bytes of a file: they will be read soon, or neither read nor written again."""


def advise(descriptor: int, offset: int, length: int, advice: Advice) -> None:
    """Tell the page cache what becomes of bytes of a file; bytes that wait to be written are begun with. macOS has no such call."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED if advice == "soon" else os.POSIX_FADV_DONTNEED)


def storage_of(tensor: torch.Tensor) -> int:
    """The same for all views of one storage, with memory and without."""
    return tensor.untyped_storage()._cdata


class Weights(Protocol):
    """Weights of which not all are in memory: a tensor is one of them, or a view of one."""

    def ensure(self, tensor: torch.Tensor) -> None:
        """Make it hold its values."""

    def expect(self, tensor: torch.Tensor) -> None:
        """`ensure` will be called for it next."""

    def release(self, tensor: torch.Tensor) -> None:
        """Its memory may be taken until it is asked for again."""


class InTurn(ABC):
    """`Weights` of one checkpoint."""

    def __init__(self) -> None:
        self._whole: dict[int, torch.Tensor] = {}
        self._waiting: set[int] = set()

    def _watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are read in their turn; none has been so far."""
        self._whole = {storage_of(tensor): tensor for tensor in tensors}
        self._waiting = set(self._whole)

    @abstractmethod
    def _read(self, key: int, whole: torch.Tensor) -> None:
        """Fill a tensor, which has memory; `key` is its storage."""

    @abstractmethod
    def _advise(self, key: int, advice: Advice) -> None:
        """Tell the system about what a tensor is read from."""

    def fill(self, tensor: torch.Tensor) -> None:
        """Read the tensor that this one is, or is a view of, if it has not been read."""
        key = storage_of(tensor)
        if key in self._waiting:
            self._waiting.remove(key)
            whole = self._whole[key]
            if not whole.untyped_storage().size():
                whole.untyped_storage().resize_(whole.nbytes)
            self._read(key, whole)

    def expect(self, tensor: torch.Tensor) -> None:
        """`fill` will be called for this one next."""
        if storage_of(tensor) in self._waiting:
            self._advise(storage_of(tensor), "soon")

    def release(self, tensor: torch.Tensor) -> None:
        """Give back the memory of the tensor that this one is, or is a view of, unless it is part of a larger one; `fill` reads it again."""
        key = storage_of(tensor)
        whole = self._whole.get(key)
        if whole is not None and whole.untyped_storage().size() == whole.nbytes:
            whole.untyped_storage().resize_(0)
            self._waiting.add(key)
