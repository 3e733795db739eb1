"""Shards: which part of a whole parameter a tensor-parallel rank holds, and which part of which source that is. Arithmetic only.

How a parameter is split is read from the attributes that megatron's parallel layers put on it, never from its name: the same name is
sharded in one layer spec and replicated in the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mswift.conversion.rules import Parts, Piece, Shape
from mswift.errors import ConversionError

Axis = Literal["tp", "etp"]
"""What a parameter is split over: the tensor-parallel ranks, or those that share one expert where experts are spread."""


def rows_of_parts(num_rows: int, parts: Parts, size: int = 1) -> tuple[int, ...]:
    """The rows of each block that `parts` speaks of, or of its share where ``num_rows`` are those of one of ``size`` ranks.

    Raises:
        ConversionError: they do not divide.
    """
    blocks = tuple(rows // size for rows in parts) if isinstance(parts, tuple) else (num_rows // parts,) * parts
    if sum(blocks) != num_rows:
        raise ConversionError(f"{num_rows} rows are not those of {parts} part(s) over {size} tensor-parallel ranks")
    return blocks


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``rank`` of ``size`` equal parts along ``dim`` (0 or 1); ``dim`` None: the whole, on every rank of the mesh ``axis``."""

    dim: int | None = None
    rank: int = 0
    size: int = 1
    axis: Axis = "tp"

    def __post_init__(self) -> None:
        if self.dim not in (None, 0, 1) or not 0 <= self.rank < self.size:
            raise ConversionError(f"shard {self.rank} of {self.size} along dim {self.dim}; wanted dim 0, 1 or None and a rank inside the size")

    @classmethod
    def of(cls, parameter: torch.Tensor, rank: int, size: int, axis: Axis = "tp") -> Shard:
        """From megatron's attributes ``tensor_model_parallel`` and ``partition_dim``, unless ``whole`` says that they mean something else."""
        if not getattr(parameter, "tensor_model_parallel", False) or "whole" in vars(parameter):
            return cls(None, rank, size, axis)
        return cls(int(parameter.partition_dim), rank, size, axis)  # type: ignore[attr-defined]

    def whole_shape(self, local_shape: Sequence[int]) -> Shape:
        """Shape of the whole parameter, from that of the local one."""
        shape = list(local_shape)
        if self.dim is not None:
            shape[self.dim] *= self.size
        return tuple(shape)

    def row_ranges(self, num_rows: int, parts: Parts = 1) -> list[tuple[int, int]]:
        """The rows ``[start, stop)`` of the whole that this shard holds, in its own order; one range for each part.

        Raises:
            ConversionError: the rows do not divide.
        """
        if self.dim != 0:
            return [(0, num_rows)]
        ranges, at = [], 0
        for rows in rows_of_parts(num_rows, parts):
            step, remainder = divmod(rows, self.size)
            if remainder:
                raise ConversionError(f"{num_rows} rows in {parts} part(s) do not divide over {self.size} tensor-parallel ranks")
            ranges.append((at + self.rank * step, at + (self.rank + 1) * step))
            at += rows
        return ranges

    def column_range(self, whole_shape: Shape) -> tuple[int, int] | None:
        """The columns of the whole that this shard holds; None for all of them."""
        if self.dim != 1:
            return None
        width, remainder = divmod(whole_shape[1], self.size)
        if remainder:
            raise ConversionError(f"{whole_shape[1]} columns do not divide over {self.size} tensor-parallel ranks")
        return self.rank * width, (self.rank + 1) * width


@dataclass(frozen=True, slots=True)
class SourceSlice:
    """Rows ``[start, stop)`` and ``columns`` (None: all) of ``source`` (None: zeros), found in the shard from row ``at`` on."""

    source: str | None
    start: int
    stop: int
    columns: tuple[int, int] | None
    at: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def source_slices(
    pieces: Sequence[Piece], shard: Shard, whole_shape: Shape, parts: Parts = 1, source_columns: int | None = None
) -> list[SourceSlice]:
    """What a shard is made of, in the order of its rows. Read it to load a shard, write it to export one.

    Args:
        pieces: the rows of the whole parameter, from `Rule.pieces`. parts: `Rule.parts`.
        source_columns: `Rule.source_columns`; columns of the shard beyond it are zeros, and its slices are that much narrower.

    Raises:
        ConversionError: the pieces are not the rows of ``whole_shape``, or it does not divide.
    """
    if sum(piece.rows for piece in pieces) != whole_shape[0]:
        raise ConversionError(f"the pieces have {sum(piece.rows for piece in pieces)} rows, the parameter {whole_shape[0]}")
    columns = shard.column_range(whole_shape)
    if source_columns is not None:
        low, high = columns or (0, whole_shape[1])
        columns = (min(low, source_columns), min(high, source_columns))
    slices, at = [], 0
    for low, high in shard.row_ranges(whole_shape[0], parts):
        position = 0
        for piece in pieces:
            first, last = max(low, position), min(high, position + piece.rows)
            if first < last:
                start = piece.start + first - position
                slices.append(SourceSlice(piece.source, start, start + last - first, columns, at))
                at += last - first
            position += piece.rows
    return slices


def cut_sources(
    pieces: Sequence[Piece],
    shards: Sequence[torch.Tensor],
    dim: int | None,
    parts: Parts = 1,
    source_columns: int | None = None,
    block_rows: int = 4096,
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The inverse of `source_slices`: from all shards of one parameter to ``(source, first row, values)``; zero rows are left out.

    Holds no second copy of the whole: shards of rows are cut in place, shards of columns joined ``block_rows`` rows at a time.

    Args:
        shards: one tensor for each rank in order; a single one for ``dim`` None. source_columns: `Rule.source_columns`.
    """
    narrow = slice(None) if source_columns is None else (slice(None), slice(source_columns))
    whole_shape = Shard(dim, 0, len(shards)).whole_shape(shards[0].shape)
    if dim == 1:
        whole = Shard(None, 0, 1)
        for part in source_slices(pieces, whole, whole_shape):
            if part.source is not None:
                for offset in range(0, part.rows, block_rows):
                    low, high = part.at + offset, part.at + min(offset + block_rows, part.rows)
                    yield part.source, part.start + offset, torch.cat([shard[low:high] for shard in shards], dim=1)[narrow]
        return
    for rank, shard in enumerate(shards):
        for part in source_slices(pieces, Shard(dim, rank, len(shards)), whole_shape, parts):
            if part.source is not None:
                yield part.source, part.start, shard[part.at : part.at + part.rows][narrow]


def take(whole: torch.Tensor, shard: Shard, parts: Parts = 1) -> torch.Tensor:
    """The shard of a whole tensor in memory; a copy where its rows are not one range."""
    if shard.dim == 1:
        low, high = shard.column_range(tuple(whole.shape)) or (0, whole.shape[1])
        return whole[:, low:high]
    ranges = [whole[low:high] for low, high in shard.row_ranges(whole.shape[0], parts)]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges)


def join(shards: Sequence[torch.Tensor], dim: int | None, parts: Parts = 1) -> torch.Tensor:
    """The whole tensor from all its shards in order, the inverse of `take`; ``dim`` None: every shard is the whole."""
    if dim is None:
        return shards[0]
    if dim == 1 or parts == 1:
        return torch.cat(list(shards), dim=dim)
    blocks = [shard.split(rows_of_parts(len(shard), parts, len(shards))) for shard in shards]
    return torch.cat([block for same in zip(*blocks, strict=True) for block in same])
