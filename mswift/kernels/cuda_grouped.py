"""Linear layers of several groups of rows on CUDA: what the schemas of `mswift::grouped_product` and `mswift::grouped_outer` say, bf16."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi
from mswift.kernels import cuda_linear
from mswift.kernels.cuda import Library, dtype_of, pointer

_THIN = 64
"""Outputs up to so many columns take the narrow tile."""


@functools.lru_cache(maxsize=4096)
def _table(device: torch.device, *places: int) -> Tensor:
    """Where the tensors of all groups start, on the device; made once for as long as they stay where they are."""
    return torch.tensor(places, device=device)


def _places(name: str, tensors: Sequence[Tensor], shape: Sequence[int], groups: int, *dtypes: torch.dtype) -> Tensor:
    """The table for `mswift_linear` of dense tensors of one shape and dtype, one for each group; nothing of them is copied."""
    wanted = torch.Size(shape)
    if len(tensors) != groups:
        raise RuntimeError(f"{name}: got {len(tensors)}, wanted one for each of {groups} groups")
    for group, tensor in enumerate(tensors):
        if tensor.shape != wanted or tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise RuntimeError(f"{name}: got {list(tensor.shape)} {tensor.dtype} for group {group}, wanted {names} {list(shape)}, one dtype for all")
    return _table(tensors[0].device, *[tensor.data_ptr() for tensor in tensors])


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As they lie, but for those with gaps."""
    return [tensor.contiguous() for tensor in tensors]


def _offsets(counts: Tensor, rows: int) -> Tensor:
    """Where the rows of each group start, and where the last ones end. On a device wrong numbers fail like an index beyond its limit: later."""
    if counts.dtype != torch.int64 or counts.dim() != 1:
        raise RuntimeError(f"counts: got {counts.dtype} {list(counts.shape)}, wanted int64 [groups]")
    ends = counts.cumsum(0)
    torch._assert_async((counts >= 0).all() & (ends[-1:] == rows).all(), f"counts: wanted numbers from 0 on that add up to the rows, {rows}")
    return torch.nn.functional.pad(ends, (1, 0))


def _mask(seeds: Tensor | None, threshold: int, first_column: int, full_width: int, groups: int) -> cuda_linear.Mask | None:
    if seeds is None or threshold == 0:
        return None
    if seeds.shape != (groups,) or seeds.dtype != torch.int64:
        raise RuntimeError(f"seeds: got {list(seeds.shape)} {seeds.dtype}, wanted int64 [{groups}]")
    mask = cuda_linear.Mask.of([threshold, 0, 0, first_column, full_width])
    return None if mask is None else mask._replace(seeds=seeds.contiguous(), scaled=False)


def _rows(name: str, x: Tensor, rows: int | None, columns: int | None) -> Tensor:
    if x.dim() != 2 or x.dtype != torch.bfloat16 or rows not in (None, len(x)) or columns not in (None, x.shape[1]):
        wanted = [size if size is not None else word for size, word in ((rows, "rows"), (columns, "columns"))]
        raise RuntimeError(f"{name}: got {list(x.shape)} {x.dtype}, wanted bfloat16 [{wanted[0]}, {wanted[1]}]")
    return x.contiguous()


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
    groups = len(weights)
    if not groups or len(counts) != groups or weights[0].dim() != 2:
        raise RuntimeError(f"weights: got {groups} for {len(counts)} counts, wanted a matrix for each group")
    weights, biases, up = _dense(weights), _dense(biases), _dense(up)
    width, into = weights[0].shape[::-1] if columns else weights[0].shape
    x, mask = _rows("x", x, None, into), _mask(seeds, threshold, first_column, full_width, groups)
    offsets, out = _offsets(counts, len(x)), x.new_empty(len(x), width)
    kept = {"x": x, "offsets": offsets, "out": out, "weight_table": _places("weights", weights, weights[0].shape, groups, x.dtype)}
    sizes = {"rows": len(x), "k": into, "x_stride": into, "n": width, "groups": groups}
    if low is not None:
        low = _rows("low", low, len(x), None)
        rank = low.shape[1]
        kept |= {"low": low, "up_table": _places("up", up, (rank, width) if columns else (width, rank), groups, x.dtype)}
        sizes["rank"] = rank
    if biases:
        kept["bias_table"] = _places("biases", biases, (width,), groups, x.dtype, torch.float32)
        sizes["bias_dtype"] = dtype_of(biases[0])
    drawn = {} if mask is None else {"x_dropout" if low is None else "adapter_dropout": mask.argument(), "group_seeds": pointer(mask.seeds)}
    fields = {name: pointer(tensor) for name, tensor in kept.items()}
    library.call("mswift_linear", x, abi.Linear(**fields, **sizes, **drawn, alpha=alpha, columns=int(columns), thin=int(width <= _THIN)))
    return out


def outer(library: Library, a: Tensor, b: Tensor, counts: Tensor, seeds: Tensor | None, threshold: int, first_column: int, full_width: int) -> Tensor:
    a, mask = _rows("a", a, None, None), _mask(seeds, threshold, first_column, full_width, len(counts))
    return cuda_linear.outer(library, a, _rows("b", b, len(a), None), a.dtype, mask=mask, offsets=_offsets(counts, len(a)))
