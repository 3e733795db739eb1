"""mxfp4 (OCP microscaling, https://arxiv.org/abs/2310.10537), as gpt-oss stores its experts: blocks of 32 values of 4 bits and an exponent each.

``x_blocks [experts, outputs, inputs / 32, 16]`` and ``x_scales [experts, outputs, inputs / 32]`` are the plain ``x [experts, inputs, outputs]``: the
low half of a byte is the even input, and a scale is a power of two with a bias of 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mswift.conversion.formats.base import Grid, Nibbles, Plain, Quantised, Span, check_shape, need
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.errors import ModelError

AUXILIARY = r"_(blocks|scales)$"
_BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; the codes 8 to 15 are their negatives."""


def find(stored: CheckpointReader, settings: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every quantised weight of a checkpoint of ``quant_method: mxfp4``.

    Raises:
        ModelError: a weight without its scales, tensors of other shapes.
    """
    for name in stored.names:
        if name.endswith("_blocks"):
            plain, shape = name.removesuffix("_blocks"), stored.shape(name)
            if len(shape) != 4 or shape[3] != _BLOCK // 2:
                raise ModelError(f"{stored.directory}: {name} has shape {shape}, wanted (experts, outputs, blocks, 16); take a plain checkpoint")
            scales = need(stored, name, f"{plain}_scales")
            check_shape(stored, scales, shape[:3])
            experts, outputs, blocks, _ = shape
            codes = Nibbles(name, (experts * outputs, blocks * _BLOCK // 2))
            grid = Grid(Plain(scales, (experts * outputs, blocks)), (1, _BLOCK))
            yield Microscaled(plain, (experts, blocks * _BLOCK, outputs), (name, scales), codes, grid)


@dataclass(frozen=True)
class Microscaled(Quantised):
    """Stored as ``[experts * outputs, inputs]``; rows of the plain tensor are experts, columns inputs."""

    codes: Nibbles
    scale: Grid

    def read(self, stored: CheckpointReader, rows: Span, columns: Span) -> Tensor:
        outputs = self.shape[2]
        lines = (rows[0] * outputs, rows[1] * outputs)
        table = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
        values = table[self.codes.read(stored, lines, columns).long()] * self.scale.read(stored, lines, columns)
        return values.view(rows[1] - rows[0], outputs, -1).transpose(1, 2)
