"""Stacks: reading and writing the rows of slabs that an HF tensor holds transposed or with gate and up in turn (`rules.Stack`).

Rules, shards and coverage speak of rows; where those are not rows of the file, the two ends of a conversion pass through here. A rank reads
the lines of the file from the first to the last that its rows lie in. For woven rows that is twice what it keeps, since gate and up lie in
turn and are read one after the other; where the slabs are transposed, every line is a column, which takes one small read for each row of the
file unless the rank keeps whole rows. Writing holds one slab at a time until it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mswift.conversion.rules import Shape, Stack
from mswift.conversion.safetensors_io import TensorReader


def _lines(stack: Stack, slab_rows: int, rows: slice) -> torch.Tensor:
    """int64: where in a slab of the file each of these rows of it lies."""
    at = torch.arange(rows.start, rows.stop)
    block = slab_rows // stack.woven
    return at % block * stack.woven + at // block


def read_rows(reader: TensorReader, name: str, stack: Stack, rows: slice, columns: slice | None) -> torch.Tensor:
    """Rows of one slab, and columns of them: ``[rows, columns]``, or ``[rows]`` where slabs are vectors; dtype of the file.

    Args:
        rows: counted over all slabs; all in one. columns: None: all of them.
    """
    shape = reader.shape(name)
    slab_rows = stack.slab_rows(shape)
    slab = rows.start // slab_rows
    lines = _lines(stack, slab_rows, slice(rows.start - slab * slab_rows, rows.stop - slab * slab_rows))
    low, high = int(lines.min()) // stack.woven * stack.woven, -(-(int(lines.max()) + 1) // stack.woven) * stack.woven
    flat = (shape[0] * shape[1], *shape[2:])
    if stack.transposed and len(shape) == 3:
        first, last, _ = (columns or slice(None)).indices(shape[1])
        found = reader.read_as(name, flat, slice(slab * shape[1] + first, slab * shape[1] + last), slice(low, high)).t()
    else:
        found = reader.read_as(name, flat, slice(slab * slab_rows + low, slab * slab_rows + high), columns)
    return found[lines - low]


class SlabWriter:
    """Collects the rows of slabs until they can be written as the file has them; keeps one slab for each tensor under way."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}

    def add(self, name: str, stack: Stack | None, shape: Shape, row: int, values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Take rows of the tensor `name` of `shape`; gives (first row of the file, values) of what is ready for `ShardWriter.write`."""
        if stack is None or stack.plain:
            yield row, values
            return
        slab_rows, slab_shape = stack.slab_rows(shape), shape[1:]
        slab = row // slab_rows
        held, missing = self._held.pop((name, slab), (values.new_empty(slab_shape), slab_rows))
        within = row - slab * slab_rows
        by_row = held.t() if stack.transposed and held.dim() == 2 else held
        by_row[_lines(stack, slab_rows, slice(within, within + len(values)))] = values
        missing -= len(values)
        if missing:
            self._held[name, slab] = held, missing
        else:
            yield slab * slab_shape[0], held
