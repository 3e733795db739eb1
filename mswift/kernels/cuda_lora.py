"""A linear layer with an adapter on CUDA: what the schemas of `mswift::lora_linear` and its gradients say, bf16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi
from mswift.kernels import cuda_linear
from mswift.kernels.cuda import Library, dtype_of
from mswift.kernels.cuda_rows import column_sum

_EITHER = (torch.float32, torch.bfloat16)


def _check(name: str, x: Tensor, columns: int, weight: Tensor, a: Tensor, b: Tensor) -> None:
    if weight.dim() != 2 or a.dim() != 2 or a.shape[1] != weight.shape[1] or b.shape != (weight.shape[0], a.shape[0]):
        wanted = "wanted weight [out, in], a [rank, in] and b [out, rank]"
        raise RuntimeError(f"lora_linear: got {list(weight.shape)}, {list(a.shape)} and {list(b.shape)}; {wanted}")
    if x.dim() != 2 or x.shape[1] != columns:
        raise RuntimeError(f"{name}: got {list(x.shape)}, wanted [tokens, {columns}]")
    if any(tensor.dtype != torch.bfloat16 for tensor in (x, weight, a, b)):
        raise RuntimeError(f"{name}, weight, a, b: got {x.dtype}, {weight.dtype}, {a.dtype} and {b.dtype}; wanted bfloat16")


def _check_one(name: str, tensor: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Where there is one: all of it, and of a dtype that the kernels read."""
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise RuntimeError(f"{name}: got {list(tensor.shape)} {tensor.dtype}, wanted {names} {list(shape)}")


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _keep_own(low: Tensor, ids: Tensor | None, adapters: int) -> Tensor:
    """A token's own adapter only, of those whose ranks lie side by side."""
    if ids is None:
        return low
    if ids.shape != low.shape[:1] or ids.dtype != torch.int64 or adapters < 1 or low.shape[1] % adapters:
        raise RuntimeError(f"ids: got {list(ids.shape)} {ids.dtype} for {adapters} adapters and ranks {low.shape[1]}, wanted int64 [{len(low)}]")
    owner = torch.arange(low.shape[1], device=low.device) // (low.shape[1] // adapters)
    return low.masked_fill_(owner != ids[:, None], 0.0)


def linear(
    library: Library,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
    ids: Tensor | None,
    adapters: int,
    scale: float,
    dropout: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    _check("x", x, weight.shape[-1], weight, a, b)
    _check_one("bias", bias, (len(weight),), *_EITHER)
    _check_one("factor", factor, (len(weight),), torch.float32)
    x, weight, a, b = (tensor.contiguous() for tensor in (x, weight, a, b))
    low = _keep_own(cuda_linear.lora_down(library, x, a, scale, cuda_linear.Mask.of(dropout)), ids, adapters)
    inner = x.new_empty(len(x) if factor is not None else 0, len(weight))
    kept = inner if factor is not None else None
    out = cuda_linear.lora_forward(library, x, weight, _dense(bias), low, b, column_scale=_dense(factor), inner=kept)
    return out, low, inner


def grad_input(
    library: Library,
    grad: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
    ids: Tensor | None,
    adapters: int,
    scale: float,
    dropout: Sequence[int],
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    _check("grad", grad, weight.shape[0], weight, a, b)
    _check_one("factor", factor, (len(weight),), torch.float32)
    grad, weight, a, b = (tensor.contiguous() for tensor in (grad, weight, a, b))
    column_scale = _dense(factor)
    grad_low = _keep_own(cuda_linear.lora_grad_low(library, grad, b, scale, column_scale=column_scale), ids, adapters)
    if not wanted:
        return grad.new_empty(0, weight.shape[1]), grad_low
    mask = cuda_linear.Mask.of(dropout)
    return cuda_linear.lora_grad_input(library, grad, weight, grad_low, a, mask, column_scale=column_scale), grad_low


def grad_factors(
    library: Library, grad: Tensor, x: Tensor, low: Tensor, grad_low: Tensor, factor: Tensor | None, inner: Tensor, dropout: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, rank = len(grad), low.shape[-1]
    for name, tensor, columns in (("grad", grad, grad.shape[-1]), ("x", x, x.shape[-1]), ("low", low, rank), ("grad_low", grad_low, rank)):
        _check_one(name, tensor, (tokens, columns), torch.bfloat16)
    _check_one("factor", factor, (grad.shape[1],), torch.float32)
    _check_one("inner", inner if factor is not None else None, (tokens, grad.shape[1]), torch.bfloat16)
    grad, x, low, grad_low = (tensor.contiguous() for tensor in (grad, x, low, grad_low))
    column_scale = _dense(factor)
    grad_a = cuda_linear.outer(library, grad_low, x, x.dtype, mask=cuda_linear.Mask.of(dropout))
    grad_b = cuda_linear.outer(library, grad, low, x.dtype, column_scale=column_scale)
    grad_factor = grad.new_empty(0, dtype=torch.float32) if factor is None else column_sum(library, grad, inner.contiguous())
    return grad_a, grad_b, grad_factor


def drop(library: Library, x: Tensor, dropout: Sequence[int]) -> Tensor:
    if x.dim() != 2 or x.dtype not in _EITHER:
        raise RuntimeError(f"x: got {list(x.shape)} {x.dtype}, wanted float32 or bfloat16 [tokens, columns]")
    mask = cuda_linear.Mask.of(dropout)
    if mask is None:
        return x.clone(memory_format=torch.contiguous_format)
    x = x.contiguous()
    out = torch.empty_like(x)
    library.call("mswift_drop", x, dtype_of(x), x, out, x.shape[0], x.shape[1], mask.argument())
    return out


def quantised_product(
    library: Library,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    block: int,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    by_columns: bool,
    dropout: Sequence[int],
) -> Tensor:
    if x.dim() != 2 or x.dtype != torch.bfloat16 or x.shape[1] != (rows if by_columns else columns):
        raise RuntimeError(f"x: got {list(x.shape)} {x.dtype}, wanted bfloat16 [tokens, {rows if by_columns else columns}]")
    if columns % 8 or block % 8 or codes.numel() != rows * columns // (2 if block else 1):
        raise RuntimeError(f"codes: got {codes.numel()} for {rows} x {columns} in blocks of {block}, wanted all of them and multiples of 8")
    _check_one("codes", codes, tuple(codes.shape), torch.uint8 if block else torch.int8)
    _check_one("scales", scales.reshape(-1), (-(-rows * columns // block) if block else rows,), torch.float32)
    width, rank = columns if by_columns else rows, 0 if low is None else low.shape[-1]
    if (low is None) != (up is None):
        raise RuntimeError("up: wanted together with low")
    _check_one("low", low, (len(x), rank), x.dtype)
    _check_one("up", up, (rank, width) if by_columns else (width, rank), x.dtype)
    _check_one("bias", bias, (rows,), *_EITHER)
    how = cuda_linear.Quantised(abi.NF4 if block else abi.INT8, (rows, columns), scales.contiguous(), block)
    x, codes, low, up = x.contiguous(), codes.contiguous(), _dense(low), _dense(up)
    if not by_columns:
        return cuda_linear.lora_forward(library, x, codes, _dense(bias), low, up, quantised=how)
    mask = cuda_linear.Mask.of(dropout)
    return cuda_linear.lora_grad_input(library, x, codes, low, up, mask._replace(scaled=False) if mask else None, quantised=how)
