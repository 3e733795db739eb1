"""fp8: a weight of one byte an element and, beside it, a scale for each block of 128 x 128, for each row or for all.

``weight = weight_fp8 * weight_scale_inv``, as DeepSeek-V3 introduced it (https://arxiv.org/abs/2412.19437, section 3.3); the ``inv`` means that
the scale is the inverse of that by which the weight was multiplied when it was quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mswift.conversion.formats.base import Affine, Grid, Plain, Quantised, blocks_of, check_shape, matrix_shape, need
from mswift.conversion.formats.settings import refuse
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.errors import ModelError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
AUXILIARY = r"weight_scale(_inv)?$|_scale_inv$"
_SCALES = ("_scale_inv", "_scale")
_BLOCK = (128, 128)


def find(stored: CheckpointReader, settings: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every quantised weight of a checkpoint of ``quant_method: fp8``.

    Raises:
        ModelError: a weight without its scale, a scale of another shape, settings that are not read.
    """
    refuse(settings, {"expert_dtype": (None, "fp8")}, str(stored.directory))
    block = _block_size(settings.get("weight_block_size"), str(stored.directory))
    for name in stored.names:
        if stored.dtype(name) in FP8:
            yield scaled_bytes(stored, name, need(stored, name, *(name + end for end in _SCALES)), block)


def scaled_bytes(stored: CheckpointReader, name: str, scale: str, block: tuple[int, int] | None) -> Affine:
    """A matrix of fp8 or int8 with its scale: for each block, for each row, or one for all.

    Raises:
        ModelError: the scale has none of these shapes.
    """
    shape = matrix_shape(stored, name)
    sizes: dict[tuple[int, ...], tuple[int, int]] = {(): shape, (1,): shape, (1, 1): shape, (shape[0], 1): (1, shape[1])}
    if block is not None:
        sizes[blocks_of(shape, block)] = block
    check_shape(stored, scale, *sizes)
    size = sizes[stored.shape(scale)]
    return Affine(name, shape, (name, scale), codes=Plain(name, shape), scale=Grid(Plain(scale, blocks_of(shape, size)), size))


def _block_size(value: Any, where: str) -> tuple[int, int]:
    block = _BLOCK if value is None else value
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise ModelError(f"{where}: weight_block_size = {value!r} in quantization_config, wanted two positive sizes such as [128, 128]; mend it")
    return block[0], block[1]
