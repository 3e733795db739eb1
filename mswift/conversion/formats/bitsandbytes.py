"""bitsandbytes of 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): sixteen values for all, the largest magnitude of each block of a weight.

A weight is one long row of 4-bit codes, the high half of a byte first. With double quantisation the magnitudes are codes themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mswift.conversion.formats.base import Nibbles, Quantised, Span, check_shape, need
from mswift.conversion.formats.settings import refuse
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.errors import ModelError

AUXILIARY = r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
_KINDS = ("nf4", "fp4")


def find(stored: CheckpointReader, settings: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every quantised weight of a checkpoint of ``quant_method: bitsandbytes``.

    Raises:
        ModelError: a weight without a part of its own, a part of another shape, settings that are not read.
    """
    refuse(settings, {"load_in_4bit": (True,), "bnb_4bit_quant_storage": (None, "uint8")}, str(stored.directory))
    for name in stored.names:
        if name.endswith(".weight") and stored.dtype(name) == torch.uint8:
            yield _weight(stored, name)


@dataclass(frozen=True)
class Magnitudes:
    """The largest magnitude of every block, in the order of the blocks. nested: (name of codes' values, name of their magnitudes, block, offset)."""

    name: str
    nested: tuple[str, str, int, float] | None = None

    def read(self, stored: CheckpointReader, first: int, last: int) -> Tensor:
        """fp32, of blocks ``[first, last)``.

        Raises:
            ModelError: one is no number.
        """
        values = stored.read(self.name, slice(first, last))
        if self.nested is not None:
            table, outer, size, offset = self.nested
            begin = first // size
            scales = stored.read(outer, slice(begin, (last - 1) // size + 1))
            values = stored.read(table)[values.long()] * scales[torch.arange(first, last) // size - begin] + offset
        if not bool(torch.isfinite(values).all()):
            raise ModelError(f"{stored.directory}: {self.name} holds values that are no numbers; download or quantise the model again")
        return values


@dataclass(frozen=True)
class Coded(Quantised):
    """``table[code] * magnitude of its block``, blocks of ``size`` elements along the rows one after the other."""

    codes: Nibbles
    table: str
    magnitudes: Magnitudes
    size: int

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        values = stored.read(self.table)[self.codes.read(stored, rows, columns).long()]
        blocks = (torch.arange(*rows)[:, None] * self.shape[1] + torch.arange(*columns)) // self.size
        first, last = int(blocks[0, 0]), int(blocks[-1, -1]) + 1
        return values * self.magnitudes.read(stored, first, last)[blocks - first]


def _weight(stored: CheckpointReader, name: str) -> Coded:
    state_name = need(stored, name, *(f"{name}.quant_state.bitsandbytes__{kind}" for kind in _KINDS))
    state = _state(stored, state_name)
    rows, columns = state["shape"]
    blocks = -(-rows * columns // state["blocksize"])
    check_shape(stored, name, (rows * columns // 2, 1), (1, rows * columns // 2))
    magnitudes, table = need(stored, name, f"{name}.absmax"), need(stored, name, f"{name}.quant_map")
    check_shape(stored, magnitudes, (blocks,))
    check_shape(stored, table, (16,))
    parts = [name, state_name, magnitudes, table]
    nested = None
    if "nested_blocksize" in state:
        outer, outer_table = need(stored, name, f"{name}.nested_absmax"), need(stored, name, f"{name}.nested_quant_map")
        check_shape(stored, outer, (-(-blocks // state["nested_blocksize"]),))
        check_shape(stored, outer_table, (256,))
        nested = (outer_table, outer, state["nested_blocksize"], state["nested_offset"])
        parts += [outer, outer_table]
    codes = Nibbles(name, (rows, columns // 2), high_first=True)
    return Coded(name, (rows, columns), tuple(parts), codes, table, Magnitudes(magnitudes, nested), state["blocksize"])


def _state(stored: CheckpointReader, name: str) -> dict[str, Any]:
    """The JSON in a quant_state tensor: shape and block sizes."""
    try:
        state = json.loads(bytes(stored.read(name).tolist()))
        rows, columns = (int(size) for size in state["shape"])
        found: dict[str, Any] = {"shape": (rows, columns), "blocksize": int(state["blocksize"])}
        if "nested_blocksize" in state:
            found |= {"nested_blocksize": int(state["nested_blocksize"]), "nested_offset": float(state["nested_offset"])}
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{stored.directory}: {name} is not the state of a matrix that bitsandbytes quantised; download the model again") from None
    if columns % 2:
        raise ModelError(f"{stored.directory}: {name} is about {columns} columns, wanted an even number; take a plain checkpoint of this model")
    return found
