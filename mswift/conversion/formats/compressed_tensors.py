"""compressed-tensors, the format of llm-compressor and vLLM: integers packed into words, int8 or fp8, with scales and zero points.

What a scale is for follows from its shape; only the bits of packed integers, the size of a group and whether there is a zero point are the
settings' to say (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mswift.conversion.formats.base import Affine, Grid, Index, Packed, Plain, Quantised, blocks_of, check_shape, matrix_shape, need
from mswift.conversion.formats.fp8 import FP8, scaled_bytes
from mswift.conversion.formats.settings import matches_target, refuse
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.errors import ModelError

AUXILIARY = r"\.weight_(packed|scale|zero_point|shape|g_idx|global_scale)$"
_FORMS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_BITS = (4, 8)


def find(stored: CheckpointReader, settings: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every quantised weight of a checkpoint of ``quant_method: compressed-tensors``.

    Raises:
        ModelError: a weight without a part of its own, a part of another shape, settings that are not read.
    """
    where = str(stored.directory)
    refuse(settings, {"format": (*_FORMS, "mixed-precision"), "transform_config": (None, {}), "sparsity_config": (None, {})}, where)
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    for name in stored.names:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            yield _packed(stored, module, _scheme(module, groups, where))
        elif name.endswith(".weight") and stored.dtype(name) in (torch.int8, *FP8):
            module = name.removesuffix(".weight")
            yield _bytes(stored, name, _scheme(module, groups, where))


def _scheme(module: str, groups: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """How the weight of a module was quantised: the group that names it, else the one that names a class, which only linear layers are."""
    named = [group for group in groups if any(matches_target(module, target) for target in group.get("targets") or ())]
    classes = [group for group in groups if any("." not in target and target[:1].isupper() for target in group.get("targets") or ())]
    found = [group.get("weights") for group in (*named, *classes)]
    if not found or not isinstance(found[0], dict):
        raise ModelError(f"{where}: {module} is stored quantised, but no entry of config_groups is about it; take the model's own config.json")
    scheme = {"quant_method": f"compressed-tensors {module}", **found[0]}
    refuse(scheme, {"strategy": ("tensor", "channel", "group", "block")}, where)
    return scheme


def _packed(stored: CheckpointReader, module: str, scheme: Mapping[str, Any]) -> Affine:
    refuse(scheme, {"num_bits": _BITS, "type": (None, "int")}, str(stored.directory))
    packed, bits = f"{module}.weight_packed", int(scheme["num_bits"])
    whole = need(stored, packed, f"{module}.weight_shape")
    check_shape(stored, whole, (2,))
    rows, columns = (int(size) for size in stored.read(whole))
    per_word = 32 // bits
    check_shape(stored, packed, (rows, -(-columns // per_word)))
    scale = need(stored, packed, f"{module}.weight_scale")
    block = _block(scheme, (rows, columns), str(stored.directory))
    check_shape(stored, scale, blocks_of((rows, columns), block), *([(1,)] if scheme["strategy"] == "tensor" else []))
    counts = blocks_of((rows, columns), block)
    index = [need(stored, packed, f"{module}.weight_g_idx")] if scheme.get("actorder") in ("group", True) else []
    for name in index:
        check_shape(stored, name, (columns,))
    order = Index(index[0], 1, counts[1]) if index else None
    zero: Grid | int = 2 ** (bits - 1)
    points = [] if scheme.get("symmetric", True) else [need(stored, packed, f"{module}.weight_zero_point")]
    for name in points:
        shape = (-(-counts[0] // per_word), counts[1])
        check_shape(stored, name, shape)
        zero = Grid(Packed(name, shape, bits, dim=0), block, order)
    codes = Packed(packed, (rows, -(-columns // per_word)), bits, dim=1)
    parts = (packed, whole, scale, *points, *index)
    return Affine(f"{module}.weight", (rows, columns), parts, codes=codes, scale=Grid(Plain(scale, counts), block, order), zero=zero)


def _block(scheme: Mapping[str, Any], shape: tuple[int, int], where: str) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        ModelError: the scheme does not say their sizes.
    """
    strategy = scheme["strategy"]
    if strategy in ("tensor", "channel"):
        return shape if strategy == "tensor" else (1, shape[1])
    key = "group_size" if strategy == "group" else "block_structure"
    value = scheme.get(key)
    sizes: Any = (1, value) if strategy == "group" else value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(size) for size in sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ModelError(f"{where}: {scheme['quant_method']} has strategy {strategy} with {key} = {value!r}; take the model's own config.json")
    return rows, columns


def _bytes(stored: CheckpointReader, name: str, scheme: Mapping[str, Any]) -> Affine:
    """int8 or fp8, one byte an element."""
    scale, shape = need(stored, name, f"{name}_scale"), matrix_shape(stored, name)
    block = _block(scheme, shape, str(stored.directory))
    weight = scaled_bytes(stored, name, scale, block)
    if scheme.get("symmetric", True):
        return weight
    point = need(stored, name, f"{name}_zero_point")
    check_shape(stored, point, stored.shape(scale))
    zero = Grid(Plain(point, blocks_of(shape, weight.scale.block)), weight.scale.block)
    return Affine(name, shape, (*weight.parts, point), codes=weight.codes, scale=weight.scale, zero=zero)
