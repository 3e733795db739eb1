"""AWQ (https://arxiv.org/abs/2306.00978) in its ``gemm`` version: packed along the output features, the even ones of eight in the low half of a word.

``weight[o, i] = (q[i, o] - z[i // group, o]) * s[i // group, o]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mswift.conversion.formats.base import Affine, Grid, Packed, Plain, Quantised, check_shape, matrix_shape, need
from mswift.conversion.formats.gptq import group_size
from mswift.conversion.formats.settings import refuse
from mswift.conversion.safetensors_io import CheckpointReader

AUXILIARY = r"\.(qweight|qzeros|scales)$"
_BITS, _PER_WORD = 4, 8
_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field of its word in which each of eight neighbouring outputs is."""


def find(stored: CheckpointReader, settings: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every quantised weight of a checkpoint of ``quant_method: awq``.

    Raises:
        ModelError: a weight without a part of its own, a part of another shape, settings that are not read.
    """
    versions = {key: str(settings[key]).lower() for key in ("version", "format") if settings.get(key) is not None}
    known = {
        **{key: (_BITS,) for key in ("bits", "w_bit") if key in settings},
        **dict.fromkeys(versions, ("gemm",)),
        "zero_point": (None, True),
        "backend": (None, "auto", "autoawq", "gemm"),
    }
    refuse({**settings, **versions}, known, str(stored.directory))
    for name in stored.names:
        if name.endswith(".qweight"):
            yield _weight(stored, name.removesuffix(".qweight"), settings)


def _weight(stored: CheckpointReader, module: str, settings: Mapping[str, Any]) -> Affine:
    packed = f"{module}.qweight"
    inputs, words = matrix_shape(stored, packed)
    outputs = words * _PER_WORD
    size = group_size(settings, inputs, str(stored.directory))
    groups = -(-inputs // size)
    zeros, scales = (need(stored, packed, f"{module}.{part}") for part in ("qzeros", "scales"))
    check_shape(stored, zeros, (groups, words))
    check_shape(stored, scales, (groups, outputs))
    return Affine(
        f"{module}.weight",
        (outputs, inputs),
        (packed, zeros, scales),
        codes=Packed(packed, (inputs, words), _BITS, dim=1, order=_FIELDS),
        scale=Grid(Plain(scales, (groups, outputs)), (size, 1)),
        zero=Grid(Packed(zeros, (groups, words), _BITS, dim=1, order=_FIELDS), (size, 1)),
        transposed=True,
    )
