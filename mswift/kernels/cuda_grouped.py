"""Linear layers of several groups of rows on CUDA: what the schemas of `mswift::grouped_product` and `mswift::grouped_outer` say, bf16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi
from mswift.kernels import cuda_linear
from mswift.kernels.cuda import Library, pointer

_THIN = 64
"""Outputs up to so many columns take the narrow tile."""


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """``[groups, ...]``: as they lie where they are parts of one tensor at equal distances, else a copy."""
    first = tensors[0]
    if all(tensor.is_contiguous() and tensor.shape == first.shape for tensor in tensors):
        places = [tensor.storage_offset() for tensor in tensors]
        one = all(tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for tensor in tensors)
        if one and places == [places[0] + number * first.numel() for number in range(len(tensors))]:
            return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(list(tensors))


def _offsets(counts: Tensor, rows: int) -> Tensor:
    if counts.dtype != torch.int64 or counts.dim() != 1:
        raise RuntimeError(f"counts: got {counts.dtype} {list(counts.shape)}, wanted int64 [groups]")
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).clamp_(max=rows)


def _mask(seeds: Tensor | None, threshold: int, first_column: int, full_width: int) -> cuda_linear.Mask | None:
    if seeds is None or threshold == 0:
        return None
    return cuda_linear.Mask(threshold, 0, 0, first_column, full_width, seeds.contiguous(), scaled=False)


def _check(name: str, x: Tensor, *tensors: Tensor) -> None:
    if x.dim() != 2 or any(tensor.dtype != torch.bfloat16 for tensor in (x, *tensors)):
        raise RuntimeError(f"{name}: got {x.dtype} {list(x.shape)}, wanted bfloat16 [rows, columns] and factors of bfloat16")


def product(
    library: Library,
    x: Tensor,
    weights: Sequence[Tensor],
    counts: Tensor,
    biases: Sequence[Tensor],
    low: Tensor | None,
    up: Sequence[Tensor],
    columns: bool,
    alpha: float,
    seeds: Tensor | None,
    threshold: int,
    first_column: int,
    full_width: int,
) -> Tensor:
    _check("grouped_product", x, *weights, *up)
    weight, mask = side_by_side(weights), _mask(seeds, threshold, first_column, full_width)
    into, width = (weight.shape[1], weight.shape[2]) if columns else (weight.shape[2], weight.shape[1])
    if x.shape[1] != into or len(counts) != len(weight):
        raise RuntimeError(f"x: got {list(x.shape)} and {len(counts)} counts, wanted [rows, {into}] and {len(weight)}")
    x, offsets, out = x.contiguous(), _offsets(counts, len(x)), x.new_empty(len(x), width)
    kept = {"x": x, "offsets": offsets, "out": out, "weight": weight}
    sizes = {"rows": len(x), "k": into, "x_stride": into, "n": width, "groups": len(weight), "weight_stride": into * width}
    if low is not None:
        ups = side_by_side(up)
        kept |= {"low": low.contiguous(), "up": ups}
        sizes |= {"rank": low.shape[1], "up_stride": ups.shape[1] * ups.shape[2]}
    if biases:
        kept["bias"], sizes["bias_stride"] = side_by_side(biases).to(x.dtype), width
    drawn = {} if mask is None else {"x_dropout" if low is None else "adapter_dropout": mask.argument(), "group_seeds": pointer(mask.seeds)}
    fields = {name: pointer(tensor) for name, tensor in kept.items()}
    library.call("mswift_linear", x, abi.Linear(**fields, **sizes, **drawn, alpha=alpha, columns=int(columns), thin=int(width <= _THIN)))
    return out


def outer(library: Library, a: Tensor, b: Tensor, counts: Tensor, seeds: Tensor | None, threshold: int, first_column: int, full_width: int) -> Tensor:
    _check("grouped_outer", a, b)
    a, b = a.contiguous(), b.contiguous()
    return cuda_linear.outer(library, a, b, a.dtype, mask=_mask(seeds, threshold, first_column, full_width), offsets=_offsets(counts, len(a)))
