"""The CUDA kernels of csrc/cuda on tensors. The library is loaded only where there is a device; MSWIFT_CUDA=0 leaves it alone.

What is here allocates, passes pointers and checks the returned code; gradients and shapes for tracing belong to the operators. bf16 for
everything with a matrix product, fp32 or bf16 for the rest; sums are in fp32 and in a fixed order.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi

_LIBRARY = Path(__file__).resolve().parent / "lib" / "libmswift_cuda.so"
_VOCABULARY_CHUNK = 64 * abi.CHUNK
_LOWEST = -1e30


class Mask(NamedTuple):
    """A dropout mask of csrc/common/dropout.h: element (i, j) here is (first_row + i, first_column + j) of the whole activation."""

    p: float
    seed: int
    first_row: int
    first_column: int
    full_width: int

    def argument(self) -> abi.Dropout:
        return abi.Dropout(self.seed, self.first_row, self.first_column, self.full_width, abi.threshold_of(self.p))


class Kernels:
    """The functions of one loaded library; `stream` gives the stream of a device on which they are started."""

    def __init__(self, library: ctypes.CDLL, stream: Callable[[torch.device], int | None]) -> None:
        self._functions, self._stream = abi.functions(library), stream
        self._explain: Any = library.mswift_cuda_error
        self._explain.restype = ctypes.c_char_p

    def _call(self, name: str, like: Tensor, *arguments: Any) -> None:
        """Tensors and structures stand for pointers. Raises RuntimeError with the library's words for the code."""
        plain = [_pointer(argument) if isinstance(argument, Tensor | ctypes.Structure) else argument for argument in arguments]
        code = self._functions[name](*plain, self._stream(like.device))
        if code:
            raise RuntimeError(f"{name} on {like.device}: {self._explain(code).decode()} (code {code})")

    # ---- the vocabulary's head

    def linear_softmax(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: int, scale: float, cap: float, gradient: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics fp32 ``[4, tokens]`` over all valid rows but the label's, and the rows averaged under them: see `linear_softmax.Statistics`."""
        tokens, width = hidden.shape
        head = _head(hidden, weight, bias, labels, valid, scale, cap, without_label=1)
        stats = hidden.new_empty(5, tokens, dtype=torch.float32)
        mean, mean2 = (hidden.new_empty(tokens if gradient >= level else 0, width, dtype=torch.float32) for level in (1, 2))
        splits = max(1, min(64, 432 // max(1, (tokens + abi.CHUNK - 1) // abi.CHUNK), (weight.shape[0] + abi.CHUNK - 1) // abi.CHUNK))
        partial = hidden.new_empty(splits, 5, tokens, dtype=torch.float32)
        chunk = min(_VOCABULARY_CHUNK, (weight.shape[0] + abi.CHUNK - 1) // abi.CHUNK * abi.CHUNK)
        if gradient:
            reference, factors = torch.empty_like(stats[0]), hidden.new_empty(2, tokens, dtype=torch.float32)
            flags = hidden.new_empty((tokens + abi.CHUNK - 1) // abi.CHUNK, dtype=torch.int32)
            scratch = hidden.new_empty(tokens, chunk)
            self._call("mswift_head_sweep", hidden, head, stats, reference, mean, scratch, chunk, partial, splits, factors, flags)
            if gradient == 2:
                distance = torch.zeros_like(stats[:4])
                distance[2] = 1.0 / scale
                self._call("mswift_head_gradient", hidden, head, reference, distance, scratch, chunk, mean2, None, 0, 0, None, None)
        else:
            self._call("mswift_head_statistics", hidden, head, stats, partial, splits)
        top, others, label, spread, _ = stats
        here = (labels >= 0) & (labels < valid)
        named = (top.clamp_min(_LOWEST), others, spread, label.masked_fill(~here, -torch.inf))
        return torch.stack(named), mean, mean2

    def linear_softmax_grad_weight(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, valid: int, scale: float, cap: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias for the gradient p (a - b z) + g [row is the label] of a logit z; `factors`: log-sum-exp, a, b, g."""
        lse, a, b, g = factors
        coefficients = torch.stack((g, a - b * lse, -b, torch.zeros_like(g)))
        chunk = min(_VOCABULARY_CHUNK, (weight.shape[0] + abi.CHUNK - 1) // abi.CHUNK * abi.CHUNK)
        scratch, grad_weight = hidden.new_empty(len(labels), chunk), torch.empty_like(weight)
        grad_bias = hidden.new_empty(0 if bias is None else weight.shape[0], dtype=torch.float32)
        sums = None if bias is None else hidden.new_empty(abi.NORM_BLOCKS + 1, chunk, dtype=torch.float32)
        if not len(labels):
            return grad_weight.zero_(), grad_bias.zero_()
        head = _head(hidden, weight, bias, labels, valid, scale, cap, without_label=0)
        arguments = (lse.contiguous(), coefficients, scratch, chunk, None, grad_weight, _dtype(weight), 0, None if bias is None else grad_bias, sums)
        self._call("mswift_head_gradient", hidden, head, *arguments)
        return grad_weight, grad_bias

    # ---- linear layers with an adapter. x [rows, in], weight [out, in], lora_a [rank, in], lora_b [out, rank]; offsets int64 [groups + 1]
    # where rows are sorted by group: then lora_a, lora_b and (three-dimensional) weight have a leading group

    def lora_down(self, x: Tensor, lora_a: Tensor, scale: float, mask: Mask | None, offsets: Tensor | None = None) -> Tensor:
        """``scale * dropout(x) @ lora_a.T``, what `lora_forward` adds and the gradient of lora_b needs."""
        rank = lora_a.shape[-2]
        low = x.new_empty(len(x), rank)
        fields = _rows(x, offsets) | {"weight": _pointer(lora_a), "weight_stride": _stride(lora_a), "out": _pointer(low), "n": rank, "alpha": scale, "thin": 1}
        self._call("mswift_linear", x, abi.Linear(**fields, x_dropout=mask.argument() if mask else abi.Dropout()))
        return low

    def lora_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        lora_b: Tensor | None,
        *,
        column_scale: Tensor | None = None,
        offsets: Tensor | None = None,
        quantised: Quantised | None = None,
    ) -> Tensor:
        """``column_scale * (x @ weight.T + low @ lora_b.T) + bias``; `column_scale` fp32 ``[out]`` is DoRA's factor."""
        width = weight.shape[-2] if quantised is None else quantised.shape[0]
        out = x.new_empty(len(x), width)
        fields = _rows(x, offsets) | _weight(weight, quantised) | _adapter(low, lora_b)
        fields |= {"bias": _pointer(bias), "column_scale": _pointer(column_scale), "out": _pointer(out), "n": width}
        self._call("mswift_linear", x, abi.Linear(**fields))
        return out

    def lora_grad_low(
        self, grad: Tensor, lora_b: Tensor, scale: float, *, column_scale: Tensor | None = None, offsets: Tensor | None = None
    ) -> Tensor:
        """``scale * (column_scale * grad) @ lora_b``."""
        rank = lora_b.shape[-1]
        low = grad.new_empty(len(grad), rank)
        fields = _rows(grad, offsets) | {"weight": _pointer(lora_b), "weight_stride": _stride(lora_b), "out": _pointer(low), "n": rank}
        self._call("mswift_linear", grad, abi.Linear(**fields, alpha=scale, thin=1, columns=1, x_column_scale=_pointer(column_scale)))
        return low

    def lora_grad_input(
        self,
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
        fields |= {"x_column_scale": _pointer(column_scale), "out": _pointer(out), "n": width, "columns": 1}
        self._call("mswift_linear", grad, abi.Linear(**fields, adapter_dropout=mask.argument() if mask else abi.Dropout()))
        return out

    def outer(
        self, a: Tensor, b: Tensor, dtype: torch.dtype, *, mask: Mask | None = None, offsets: Tensor | None = None, column_scale: Tensor | None = None
    ) -> Tensor:
        """``a.T @ dropout(b)`` over the rows of each group: ``[m, n]``, or ``[groups, m, n]`` with `offsets`; `column_scale` multiplies `a`."""
        (rows, m), n, groups = a.shape, b.shape[1], 1 if offsets is None else len(offsets) - 1
        out = a.new_empty((m, n) if offsets is None else (groups, m, n), dtype=dtype)
        tiles = groups * ((m + abi.CHUNK - 1) // abi.CHUNK) * ((n + abi.CHUNK - 1) // abi.CHUNK)
        splits = abi.splits_of(rows // groups, tiles)
        partial = a.new_empty(splits, groups, m, n, dtype=torch.float32) if splits > 1 else None
        fields = {"a": _pointer(a), "b": _pointer(b), "offsets": _pointer(offsets), "out": _pointer(out), "partial": _pointer(partial)}
        sizes = {"rows": rows, "m": m, "n": n, "a_stride": m, "b_stride": n, "groups": groups, "splits": splits, "out_dtype": _dtype(out)}
        dropout = mask.argument() if mask else abi.Dropout()
        self._call("mswift_outer", a, abi.Outer(**fields, **sizes, alpha=1.0, b_dropout=dropout, a_column_scale=_pointer(column_scale)))
        return out


class Quantised(NamedTuple):
    """How to read quantised codes: `kind` abi.INT8 (scales fp32, one a row) or abi.NF4 (one for `block` elements)."""

    kind: int
    shape: tuple[int, int]
    scales: Tensor
    block: int = 0


def _pointer(value: Tensor | ctypes.Structure | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, ctypes.Structure):
        return ctypes.addressof(value)
    assert value.is_contiguous(), "kernels take dense tensors; the operators see to it"
    return value.data_ptr()


def _dtype(tensor: Tensor) -> int:
    return abi.DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _stride(tensor: Tensor) -> int:
    """From one group to the next; 0 where all share the tensor."""
    return tensor.shape[1] * tensor.shape[2] if tensor.dim() == 3 else 0


def _rows(x: Tensor, offsets: Tensor | None) -> dict[str, Any]:
    groups = 1 if offsets is None else len(offsets) - 1
    sizes = {"rows": len(x), "k": x.shape[1], "x_stride": x.shape[1], "groups": groups}
    return {"x": _pointer(x), "offsets": _pointer(offsets), "alpha": 1.0, **sizes}


def _adapter(low: Tensor | None, up: Tensor | None) -> dict[str, Any]:
    if low is None or up is None:
        return {}
    return {"low": _pointer(low), "up": _pointer(up), "rank": low.shape[1], "up_stride": _stride(up)}


def _weight(weight: Tensor, quantised: Quantised | None) -> dict[str, Any]:
    if quantised is None:
        return {"weight": _pointer(weight), "weight_stride": _stride(weight)}
    return {"weight": _pointer(weight), "weight_scales": _pointer(quantised.scales), "weight_kind": quantised.kind, "weight_block": quantised.block}


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: int, scale: float, cap: float, *, without_label: int
) -> abi.Head:
    """Labels count from the first row that is here."""
    sizes = {"tokens": len(hidden), "hidden": hidden.shape[1], "vocab": weight.shape[0], "first": 0, "size": valid}
    pointers = {"x": _pointer(hidden), "weight": _pointer(weight), "bias": _pointer(bias), "labels": _pointer(labels)}
    return abi.Head(**pointers, **sizes, scale=scale, softcap=cap, without_label=without_label)


def missing() -> str | None:
    """Why the CUDA kernels cannot be used here; None: they can."""
    if os.environ.get("MSWIFT_CUDA") == "0":
        return "MSWIFT_CUDA=0"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if _LIBRARY.is_file() else "they were not built: install with nvcc on PATH or CUDA_HOME set"


@functools.cache
def kernels() -> Kernels:
    """The library of this installation; ask `missing` first."""
    return Kernels(ctypes.CDLL(str(_LIBRARY)), lambda device: torch.cuda.current_stream(device).cuda_stream)
