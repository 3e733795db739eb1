"""What the formats have in common: packed integers, a scale for each block of a matrix, and the product of the two for any part of it.

All is computed in fp32, where it is exact for the integers and the formats of 8 bits at hand, and rounded once by the caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mswift.conversion.rules import Shape
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.errors import ModelError

Span = tuple[int, int]
"""First and past-the-last position along one dim."""


@dataclass(frozen=True)
class Quantised(ABC):
    """One weight that is stored quantised.

    Args:
        name, shape: of the plain weight, ``[rows, columns, ...]``. parts: the stored tensors that it is made of, scales and all.
    """

    name: str
    shape: Shape
    parts: tuple[str, ...]

    @property
    def rows_first(self) -> bool:
        """Whether its rows lie together in the file; else its columns do."""
        return True

    @abstractmethod
    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        """fp32 ``[rows, columns, ...]`` of that part, from the stored bytes that it needs and no others."""


class Numbers(Protocol):
    """A stored matrix of numbers.

    Args:
        name: of the tensor.
    """

    @property
    def name(self) -> str: ...

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor: ...


@dataclass(frozen=True)
class Plain:
    """Numbers that are stored as they are. shape: take the tensor as if it had this one, of two dims."""

    name: str
    shape: Shape

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        return stored.read_as(self.name, self.shape, slice(*rows), slice(*columns))


@dataclass(frozen=True)
class Packed:
    """Unsigned integers of ``bits`` bits in the words of an int32 matrix, packed along ``dim``.

    Args:
        order: the field of its word that the n-th integer is in, counted from the lowest bits. offset: is added to every field of a word, as
            one sum with carries (modulo 2**32).
    """

    name: str
    shape: Shape
    bits: int
    dim: int
    order: tuple[int, ...] | None = None
    offset: int = 0

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        per_word, spans = 32 // self.bits, [rows, columns]
        start, stop = spans[self.dim]
        spans[self.dim] = (start // per_word, -(-stop // per_word))
        words = stored.read_as(self.name, self.shape, *(slice(*span) for span in spans))
        if self.offset:
            words = words + sum(self.offset << field * self.bits for field in range(per_word))
        shifts = torch.tensor(self.order or range(per_word), dtype=torch.int32) * self.bits
        fields = (words.unsqueeze(self.dim + 1) >> (shifts if self.dim else shifts[:, None])) & (2**self.bits - 1)
        return fields.flatten(self.dim, self.dim + 1).narrow(self.dim, start - spans[self.dim][0] * per_word, stop - start)


@dataclass(frozen=True)
class Nibbles:
    """Integers of 4 bits, two in each byte of the rows of a matrix.

    Args:
        shape: of the bytes: half the columns. high_first: the even columns are the high halves.
    """

    name: str
    shape: Shape
    high_first: bool = False

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        first = columns[0] // 2
        pairs = stored.read_as(self.name, self.shape, slice(*rows), slice(first, -(-columns[1] // 2)))
        halves = (pairs >> 4, pairs & 15) if self.high_first else (pairs & 15, pairs >> 4)
        return torch.stack(halves, -1).flatten(1).narrow(1, columns[0] - 2 * first, columns[1] - columns[0])


@dataclass(frozen=True)
class Index:
    """The block of every position along a dim, where the positions of a block lie anywhere.

    Args:
        name: of an int32 tensor. count: how many blocks there are.
    """

    name: str
    dim: int
    count: int

    def read(self, stored: CheckpointReader, span: Span) -> Tensor:
        """int64, of the positions of a span.

        Raises:
            ModelError: there is no such block.
        """
        blocks = stored.read(self.name, slice(*span)).long()
        if int(blocks.min()) < 0 or int(blocks.max()) >= self.count:
            raise ModelError(f"{stored.directory}: {self.name} names groups outside 0 to {self.count - 1}; download or quantise the model again")
        return blocks


@dataclass(frozen=True)
class Grid:
    """A number for each block of a matrix, spread over its elements.

    Args:
        numbers: one for each block. block: rows and columns of one. index: which block is whose, along one dim.
    """

    numbers: Numbers
    block: tuple[int, int]
    index: Index | None = None

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        """fp32 ``[rows, columns]``.

        Raises:
            ModelError: a number is none, or the index names no block.
        """
        entries = [torch.arange(*span) // size for span, size in zip((rows, columns), self.block)]
        if self.index is not None:
            entries[self.index.dim] = self.index.read(stored, (rows, columns)[self.index.dim])
        low, high = [int(entry.min()) for entry in entries], [int(entry.max()) + 1 for entry in entries]
        numbers = as_float(self.numbers.read(stored, (low[0], high[0]), (low[1], high[1])))
        if not bool(torch.isfinite(numbers).all()):
            raise ModelError(f"{stored.directory}: {self.numbers.name} holds values that are no numbers; download or quantise the model again")
        return numbers.index_select(0, entries[0] - low[0]).index_select(1, entries[1] - low[1])


@dataclass(frozen=True)
class Affine(Quantised):
    """``(codes - zero) * scale``.

    Args:
        zero: a number, or one for each block. transposed: codes, scale and zero are of the transposed matrix.
    """

    codes: Numbers
    scale: Grid
    zero: Grid | int = 0
    transposed: bool = False

    @property
    def rows_first(self) -> bool:
        return not self.transposed

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        spans = (columns, rows) if self.transposed else (rows, columns)
        values = self.codes.read(stored, *spans).float()
        values -= self.zero.read(stored, *spans) if isinstance(self.zero, Grid) else self.zero
        values *= self.scale.read(stored, *spans)
        return values.T if self.transposed else values


def as_float(numbers: Tensor) -> Tensor:
    """fp32; bytes are exponents of two with a bias of 127 (E8M0), 255 is no number."""
    if numbers.dtype == torch.uint8:
        return torch.where(numbers == 255, torch.nan, torch.ldexp(torch.ones(numbers.shape), numbers.int() - 127))
    return numbers.float()


def need(stored: CheckpointReader, weight: str, *names: str) -> str:
    """That part of a weight which has one of these names.

    Raises:
        ModelError: it is missing.
    """
    for name in names:
        if name in stored:
            return name
    raise ModelError(f"{stored.directory}: {weight} is stored quantised without its {' or '.join(names)}; download or quantise the model again")


def check_shape(stored: CheckpointReader, name: str, *wanted: Shape) -> None:
    """Refuse a part of a weight whose shape is none of those that it can have.

    Raises:
        ModelError: what it is and should be.
    """
    if stored.shape(name) not in wanted:
        raise ModelError(
            f"{stored.directory}: {name} has shape {stored.shape(name)}, wanted {' or '.join(map(str, wanted))} for its weight; "
            "quantization_config and the tensors have to describe one model"
        )


def matrix_shape(stored: CheckpointReader, name: str) -> tuple[int, int]:
    """The shape of a stored matrix.

    Raises:
        ModelError: it is of other than two dims.
    """
    shape = stored.shape(name)
    if len(shape) != 2:
        raise ModelError(f"{stored.directory}: {name} is quantised and has shape {shape}, wanted two dims; take a plain checkpoint of this model")
    return shape[0], shape[1]


def blocks_of(shape: Shape, block: tuple[int, int]) -> Shape:
    """How many blocks a matrix has along both dims, ragged ones counted."""
    return tuple(-(-size // step) for size, step in zip(shape, block))
