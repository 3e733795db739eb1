"""GPTQ (https://arxiv.org/abs/2210.17323): integers packed along the input features, a scale and a zero point for each group of them.

``weight[o, i] = (q[i, o] - z[g(i), o]) * s[g(i), o]``. The first version of the format stores ``z - 1``: it subtracted a one from every field of
a word, with borrows, so a one is added to every field, with carries. ``g_idx`` is the group of each input feature; quantised in the order of
activations (``desc_act``), the features of a group lie anywhere, and a slice of them needs the scales of many groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mswift.conversion.formats.base import Affine, Grid, Index, Packed, Plain, Quantised, check_shape, matrix_shape, need
from mswift.conversion.formats.settings import refuse
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.errors import ModelError

AUXILIARY = r"\.(qweight|qzeros|scales|g_idx)$"
_BITS = (2, 4, 8)


def find(stored: CheckpointReader, settings: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every quantised weight of a checkpoint of ``quant_method: gptq``.

    Raises:
        ModelError: a weight without a part of its own, a part of another shape, settings that are not read.
    """
    where = str(stored.directory)
    form = {key: settings.get(key) for key in ("checkpoint_format", "format") if settings.get(key) is not None}
    refuse({**settings, **form}, dict.fromkeys(form, ("gptq", "gptq_v2")), where)
    refuse(settings, {"bits": _BITS, "pack_dtype": (None, "int32"), "is_marlin_format": (None, False)}, where)
    apart = [pattern for pattern in settings.get("dynamic") or () if not pattern.startswith("-:")]
    if apart:
        raise ModelError(f"{where}: modules with gptq settings of their own ({apart[0]}) are not read; take a checkpoint with one setting for all")
    offset = 0 if "gptq_v2" in form.values() else 1
    for name in stored.names:
        if name.endswith(".qweight"):
            yield _weight(stored, name.removesuffix(".qweight"), settings, offset)


def _weight(stored: CheckpointReader, module: str, settings: Mapping[str, Any], offset: int) -> Affine:
    packed, bits = f"{module}.qweight", int(settings["bits"])
    per_word = 32 // bits
    words, outputs = matrix_shape(stored, packed)
    inputs = words * per_word
    size = group_size(settings, inputs, str(stored.directory))
    groups = -(-inputs // size)
    zeros, scales = (need(stored, packed, f"{module}.{part}") for part in ("qzeros", "scales"))
    check_shape(stored, zeros, (groups, -(-outputs // per_word)))
    check_shape(stored, scales, (groups, outputs))
    index = [f"{module}.g_idx"] if settings.get("desc_act") or f"{module}.g_idx" in stored else []
    for name in index:
        check_shape(stored, need(stored, packed, name), (inputs,))
    order = Index(index[0], 0, groups) if index else None
    return Affine(
        f"{module}.weight",
        (outputs, inputs),
        (packed, zeros, scales, *index),
        codes=Packed(packed, (words, outputs), bits, dim=0),
        scale=Grid(Plain(scales, (groups, outputs)), (size, 1), order),
        zero=Grid(Packed(zeros, stored.spec(zeros).shape, bits, dim=1, offset=offset), (size, 1), order),
        transposed=True,
    )


def group_size(settings: Mapping[str, Any], inputs: int, where: str) -> int:
    """Input features of a group; -1 means all.

    Raises:
        ModelError: the settings name no such size.
    """
    size = settings.get("group_size", settings.get("q_group_size"))
    if not isinstance(size, int) or size == 0 or size < -1:
        raise ModelError(f"{where}: group_size = {size!r} in quantization_config, wanted a number of input features, or -1 for all; mend it")
    return inputs if size == -1 else size
