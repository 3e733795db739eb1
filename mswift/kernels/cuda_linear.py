"""Linear layers with an adapter on CUDA, for one or several groups of rows, bf16 or quantised weights.

x ``[rows, in]``, weight ``[out, in]``, lora_a ``[rank, in]``, lora_b ``[out, rank]``. With offsets, int64 ``[groups + 1]``, the rows are sorted
by group, and those of weight, lora_a and lora_b that have three dimensions have one matrix for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi
from mswift.kernels.cuda import Library, dtype_of, pointer


class Mask(NamedTuple):
    """A dropout mask of csrc/common/dropout.h: element (i, j) here is (first_row + i, first_column + j) of the whole activation.

    threshold: the rate in 256ths. scaled: what is kept is multiplied by 256 / (256 - threshold). seeds: int64 ``[groups]``, one for each group in
    the place of `seed`; rows then count from the group's first.
    """

    threshold: int
    seed: int
    first_row: int
    first_column: int
    full_width: int
    seeds: Tensor | None = None
    scaled: bool = True

    @staticmethod
    def of(dropout: Sequence[int]) -> Mask | None:
        """As the operators' schemas tell it; None where nothing is dropped."""
        if len(dropout) != 5 or not 0 <= dropout[0] < 256:
            raise RuntimeError(f"dropout: got {list(dropout)}, wanted [threshold below 256, seed, first row, first column, full width]")
        threshold, seed, first_row, first_column, full_width = dropout
        return Mask(threshold, seed, first_row, first_column, full_width) if threshold else None

    def argument(self) -> abi.Dropout:
        return abi.Dropout(self.seed, self.first_row, self.first_column, self.full_width, self.threshold, int(not self.scaled))


class Quantised(NamedTuple):
    """How to read quantised codes: `kind` abi.INT8 (scales fp32, one a row) or abi.NF4 (one for `block` elements)."""

    kind: int
    shape: tuple[int, int]
    scales: Tensor
    block: int = 0


def _masked(name: str, mask: Mask | None) -> dict[str, Any]:
    """The field `name` of a structure, and each group's seed beside it."""
    return {} if mask is None else {name: mask.argument(), "group_seeds": pointer(mask.seeds)}


def _stride(tensor: Tensor) -> int:
    """From one group to the next; 0 where all share the tensor."""
    return tensor.shape[1] * tensor.shape[2] if tensor.dim() == 3 else 0


def _rows(x: Tensor, offsets: Tensor | None) -> dict[str, Any]:
    groups = 1 if offsets is None else len(offsets) - 1
    sizes = {"rows": len(x), "k": x.shape[1], "x_stride": x.shape[1], "groups": groups}
    return {"x": pointer(x), "offsets": pointer(offsets), "alpha": 1.0, **sizes}


def _adapter(low: Tensor | None, up: Tensor | None) -> dict[str, Any]:
    if low is None or up is None:
        return {}
    return {"low": pointer(low), "up": pointer(up), "rank": low.shape[1], "up_stride": _stride(up)}


def _weight(weight: Tensor, quantised: Quantised | None) -> dict[str, Any]:
    if quantised is None:
        return {"weight": pointer(weight), "weight_stride": _stride(weight)}
    return {"weight": pointer(weight), "weight_scales": pointer(quantised.scales), "weight_kind": quantised.kind, "weight_block": quantised.block}


def lora_down(library: Library, x: Tensor, lora_a: Tensor, scale: float, mask: Mask | None, offsets: Tensor | None = None) -> Tensor:
    """``scale * dropout(x) @ lora_a.T``, what `lora_forward` adds and the gradient of lora_b needs."""
    rank = lora_a.shape[-2]
    low = x.new_empty(len(x), rank)
    fields = _rows(x, offsets) | {
        "weight": pointer(lora_a),
        "weight_stride": _stride(lora_a),
        "out": pointer(low),
        "n": rank,
        "alpha": scale,
        "thin": 1,
    }
    library.call("mswift_linear", x, abi.Linear(**fields, **_masked("x_dropout", mask)))
    return low


def lora_forward(
    library: Library,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    lora_b: Tensor | None,
    *,
    column_scale: Tensor | None = None,
    offsets: Tensor | None = None,
    quantised: Quantised | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """``column_scale * (x @ weight.T + low @ lora_b.T) + bias``; `column_scale` fp32 ``[out]`` is DoRA's factor.

    inner: is written with the sum in brackets.
    """
    width = weight.shape[-2] if quantised is None else quantised.shape[0]
    out = x.new_empty(len(x), width)
    fields = _rows(x, offsets) | _weight(weight, quantised) | _adapter(low, lora_b)
    if bias is not None:
        fields |= {"bias": pointer(bias), "bias_dtype": dtype_of(bias), "bias_stride": width if bias.dim() == 2 else 0}
    fields |= {"column_scale": pointer(column_scale), "out": pointer(out), "inner": pointer(inner), "n": width}
    library.call("mswift_linear", x, abi.Linear(**fields))
    return out


def lora_grad_low(
    library: Library, grad: Tensor, lora_b: Tensor, scale: float, *, column_scale: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """``scale * (column_scale * grad) @ lora_b``."""
    rank = lora_b.shape[-1]
    low = grad.new_empty(len(grad), rank)
    fields = _rows(grad, offsets) | {"weight": pointer(lora_b), "weight_stride": _stride(lora_b), "out": pointer(low), "n": rank}
    library.call("mswift_linear", grad, abi.Linear(**fields | {"alpha": scale, "thin": 1, "columns": 1, "x_column_scale": pointer(column_scale)}))
    return low


def lora_grad_input(
    library: Library,
    grad: Tensor,
    weight: Tensor,
    grad_low: Tensor | None,
    lora_a: Tensor | None,
    mask: Mask | None,
    *,
    column_scale: Tensor | None = None,
    offsets: Tensor | None = None,
    quantised: Quantised | None = None,
) -> Tensor:
    """``(column_scale * grad) @ weight + mask * (grad_low @ lora_a)``, the mask drawn again."""
    width = weight.shape[-1] if quantised is None else quantised.shape[1]
    out = grad.new_empty(len(grad), width)
    fields = _rows(grad, offsets) | _weight(weight, quantised) | _adapter(grad_low, lora_a)
    fields |= {"x_column_scale": pointer(column_scale), "out": pointer(out), "n": width, "columns": 1}
    library.call("mswift_linear", grad, abi.Linear(**fields, **_masked("adapter_dropout", mask)))
    return out


def outer(
    library: Library,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    *,
    mask: Mask | None = None,
    offsets: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """``a.T @ dropout(b)`` over the rows of each group: ``[m, n]``, or ``[groups, m, n]`` with `offsets`; `column_scale` multiplies `a`."""
    (rows, m), n, groups = a.shape, b.shape[1], 1 if offsets is None else len(offsets) - 1
    out = a.new_empty((m, n) if offsets is None else (groups, m, n), dtype=dtype)
    tiles = groups * ((m + abi.CHUNK - 1) // abi.CHUNK) * ((n + abi.CHUNK - 1) // abi.CHUNK)
    splits = abi.splits_of(rows // groups, m, n, tiles)
    partial = a.new_empty(splits, groups, m, n, dtype=torch.float32) if splits > 1 else None
    fields = {"a": pointer(a), "b": pointer(b), "offsets": pointer(offsets), "out": pointer(out), "partial": pointer(partial)}
    sizes = {"rows": rows, "m": m, "n": n, "a_stride": m, "b_stride": n, "groups": groups, "splits": splits, "out_dtype": dtype_of(out)}
    library.call("mswift_outer", a, abi.Outer(**fields, **sizes, **_masked("b_dropout", mask), alpha=1.0, a_column_scale=pointer(column_scale)))
    return out
