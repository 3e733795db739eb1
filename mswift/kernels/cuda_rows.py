"""Element-wise and row-wise operators on CUDA, fp32 or bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi
from mswift.kernels.cuda import Library, dtype_of, pointer


def rms_norm(
    library: Library, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, zero_centred: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, x + residual, 1 / rms)`` of rows ``[rows, cols]``; the sum is `x` itself without a residual."""
    rows, cols = x.shape
    y, rstd = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    summed = None if residual is None else torch.empty_like(x)
    library.call("mswift_rms_norm_forward", x, dtype_of(x), x, residual, weight, y, summed, rstd, rows, cols, eps, int(zero_centred))
    return y, x if summed is None else summed, rstd


def rms_norm_backward(
    library: Library,
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    zero_centred: bool = False,
    of_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (that of the norm plus `grad_sum`) and, in fp32, of the weight, or nothing."""
    rows, cols = summed.shape
    grad_x, grad_weight = torch.empty_like(summed), summed.new_empty(cols if of_weight else 0, dtype=torch.float32)
    sums = (summed.new_empty(abi.NORM_BLOCKS, cols, dtype=torch.float32), grad_weight) if of_weight else (None, None)
    arguments = (dtype_of(grad), grad, grad_sum, summed, weight, rstd, grad_x, *sums, rows, cols, int(zero_centred))
    library.call("mswift_rms_norm_backward", grad, *arguments)
    return grad_x, grad_weight


def gated(library: Library, gate_up: Tensor, shape: tuple[float, float, float, float]) -> Tensor:
    """``act(gate) * up`` of ``[rows, 2 * cols]``, gate first; `shape`: slope, cubic, limit, offset."""
    rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
    out, gate = gate_up.new_empty(rows, cols), pointer(gate_up) or 0
    sizes = (rows, cols, 2 * cols)
    library.call("mswift_gated_forward", gate_up, dtype_of(gate_up), gate, gate + cols * gate_up.element_size(), out, *sizes, *shape)
    return out


def gated_backward(library: Library, grad: Tensor, gate_up: Tensor, shape: tuple[float, float, float, float]) -> Tensor:
    """The gradient of both halves."""
    rows, cols = grad.shape
    out, width = torch.empty_like(gate_up), cols * gate_up.element_size()
    gate, into = pointer(gate_up) or 0, pointer(out) or 0
    arguments = (dtype_of(grad), grad, gate, gate + width, into, into + width, rows, cols, 2 * cols, *shape)
    library.call("mswift_gated_backward", grad, *arguments)
    return out


def rope(library: Library, x: Tensor, out: Tensor, table: tuple[Tensor, Tensor], *, repeat: int = 1, interleaved: bool, sign: int) -> Tensor:
    """Rotate ``[tokens, heads, dim]``, a view of a wider tensor perhaps, into `out`, which may be `x` itself.

    table: cosine and sine, fp32 ``[tokens / repeat, rotary / 2]``. repeat: so many tokens share a row of them. sign: -1 turns back.
    """
    tokens, heads, dim = x.shape
    assert x.stride(2) == out.stride(2) == 1
    where = (tokens, heads, dim, 2 * table[0].shape[1], repeat, x.stride(0), x.stride(1), out.stride(0), out.stride(1), int(interleaved), sign)
    library.call("mswift_rope", x, dtype_of(x), x.data_ptr(), out.data_ptr(), *table, *where)
    return out


def gather_rows(library: Library, x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, zeros where the index is negative."""
    out = x.new_empty(len(index), x.shape[1])
    library.call("mswift_gather_rows", x, dtype_of(x), x, index, out, len(index), x.shape[1])
    return out


def combine_rows(library: Library, x: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """``sum_k weights[t, k] * x[index[t, k]]``, index ``[tokens, k]``, weights fp32 or None for ones."""
    tokens, k = index.shape
    out = x.new_empty(tokens, x.shape[1])
    library.call("mswift_combine_rows", x, dtype_of(x), x, index, weights, out, tokens, k, x.shape[1])
    return out


def combine_rows_backward(library: Library, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (zero for rows that no index names) and of the weights."""
    tokens, k = index.shape
    grad_x, grad_weights = torch.zeros_like(x), x.new_empty(tokens, k, dtype=torch.float32)
    library.call("mswift_combine_rows_backward", grad, dtype_of(x), grad, x, index, weights, grad_x, grad_weights, tokens, k, x.shape[1])
    return grad_x, grad_weights


def column_sum(library: Library, a: Tensor, b: Tensor | None = None) -> Tensor:
    """``(a * b).sum(0)`` in fp32: a bias's gradient, or with `b` that of DoRA's magnitude."""
    rows, cols = a.shape
    partial, out = a.new_empty(abi.NORM_BLOCKS, cols, dtype=torch.float32), a.new_empty(cols, dtype=torch.float32)
    library.call("mswift_column_sum", a, dtype_of(a), a, b, partial, out, rows, cols, cols)
    return out


# ---- what the operators' schemas say --------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _check_norm(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise RuntimeError(f"rms_norm: weight must be [hidden] of x and of its dtype, got {list(weight.shape)} of {weight.dtype}")


def norm(library: Library, x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> tuple[Tensor, Tensor]:
    _check_norm(x, weight)
    y, _, rstd = rms_norm(library, _rows(x), None, weight.contiguous(), eps, zero_centred=zero_centred)
    return y.view(x.shape), rstd.view(x.shape[:-1])


def add_norm(library: Library, x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise RuntimeError(f"add_rms_norm: residual must be as x, got {list(residual.shape)} of {residual.dtype}")
    y, total, rstd = rms_norm(library, _rows(x), _rows(residual), weight.contiguous(), eps, zero_centred=zero_centred)
    return y.view(x.shape), total.view(x.shape), rstd.view(x.shape[:-1])


def norm_backward(
    library: Library, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centred: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    _check_norm(x, weight)
    for name, tensor in (("grad", grad), ("grad_sum", grad_sum)):
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype):
            raise RuntimeError(f"{name}: got {list(tensor.shape)} {tensor.dtype}, wanted as x, {list(x.shape)} {x.dtype}")
    if rstd.shape != x.shape[:-1] or rstd.dtype != torch.float32:
        raise RuntimeError(f"rstd: got {list(rstd.shape)} {rstd.dtype}, wanted float32 {list(x.shape[:-1])}")
    inputs = (_rows(grad), None if grad_sum is None else _rows(grad_sum), _rows(x), weight.contiguous(), rstd.contiguous())
    grad_x, grad_weight = rms_norm_backward(library, *inputs, zero_centred=zero_centred, of_weight=of_weight)
    return grad_x.view(x.shape), grad_weight


def _check_gate(x: Tensor, limit: float) -> None:
    if x.dim() < 1 or x.shape[-1] % 2:
        raise RuntimeError(f"gated_activation: x must be [..., gate and up side by side], got {list(x.shape)}")
    if not limit > 0:
        raise RuntimeError(f"gated_activation: limit must be above 0, got {limit}")


def gated_activation(library: Library, x: Tensor, slope: float, cubic: float, limit: float, offset: float) -> Tensor:
    _check_gate(x, limit)
    return gated(library, _rows(x), (slope, cubic, limit, offset)).view(*x.shape[:-1], x.shape[-1] // 2)


def gated_activation_backward(library: Library, grad: Tensor, x: Tensor, slope: float, cubic: float, limit: float, offset: float) -> Tensor:
    _check_gate(x, limit)
    if grad.shape != (*x.shape[:-1], x.shape[-1] // 2) or grad.dtype != x.dtype:
        raise RuntimeError(f"grad: got {list(grad.shape)} {grad.dtype}, wanted {x.dtype} {[*x.shape[:-1], x.shape[-1] // 2]}")
    return gated_backward(library, _rows(grad), _rows(x), (slope, cubic, limit, offset)).view(x.shape)


def _check_table(table: Tensor, tokens: int, width: int) -> None:
    if table.dim() != 3 or table.shape[:2] != (2, tokens) or table.dtype != torch.float32 or 2 * table.shape[2] > width:
        raise RuntimeError(f"rotate: table must be float32 [2, s, half of the rotated columns], got {list(table.shape)}")


def rotate(library: Library, x: Tensor, table: Tensor, interleaved: bool, back: bool) -> Tensor:
    if x.dim() != 4:
        raise RuntimeError(f"rotate: x must be [s, b, heads, columns], got {list(x.shape)}")
    _check_table(table, x.shape[0], x.shape[3])
    length, batch, heads, width = x.shape
    if x.stride(3) != 1 or (length > 1 and batch > 1 and x.stride(0) != batch * x.stride(1)):
        x = x.contiguous()
    out = x.new_empty(x.shape)
    if out.numel():
        stride = x.stride(1) if batch > 1 else x.stride(0)
        flat = x.as_strided((length * batch, heads, width), (stride, x.stride(2), 1))
        cosine, sine = table.contiguous()
        rope(library, flat, out.view(flat.shape), (cosine, sine), repeat=batch, interleaved=interleaved, sign=-1 if back else 1)
    return out


def rotate_in_place(library: Library, x: Tensor, table: Tensor, width: int, each: int, turned: int, interleaved: bool, back: bool) -> None:
    if x.dim() < 3 or width < 1 or not 0 < turned <= each or x.shape[2:].numel() % (each * width):
        raise RuntimeError(f"rotate_: x must be [s, b, groups of {each} heads of {width}], {turned} of each turned, got {list(x.shape)}")
    _check_table(table, x.shape[0], width)
    if not x.numel():
        return
    whole = x.contiguous()
    heads = whole.view(-1, each, width)[:, :turned]
    cosine, sine = table.contiguous()
    rope(library, heads, heads, (cosine, sine), repeat=len(heads) // x.shape[0], interleaved=interleaved, sign=-1 if back else 1)
    if whole.data_ptr() != x.data_ptr():
        x.copy_(whole)


def _check_index(x: Tensor, index: Tensor, dims: int) -> None:
    """What a number beyond the rows does shows later on a device, as with torch's own indices."""
    if x.dim() != 2 or index.dim() != dims or index.dtype != torch.int64:
        raise RuntimeError(f"index: got {list(index.shape)} {index.dtype} for {list(x.shape)}, wanted int64 of {dims} dimensions for [rows, columns]")
    torch._assert_async((index < len(x)).all(), f"index: wanted numbers below the rows, {len(x)}")


def _factors(index: Tensor, weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    if weights.shape != index.shape or not weights.is_floating_point():
        raise RuntimeError(f"weights: got {list(weights.shape)} {weights.dtype}, wanted as many as places, {list(index.shape)}")
    return weights.float().contiguous()


def gather(library: Library, x: Tensor, index: Tensor) -> Tensor:
    _check_index(x, index, 1)
    return gather_rows(library, x.contiguous(), index.contiguous())


def combine(library: Library, x: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    _check_index(x, index, 2)
    return combine_rows(library, x.contiguous(), index.contiguous(), _factors(index, weights))


def combine_backward(library: Library, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_index(x, index, 2)
    if grad.shape != (len(index), x.shape[1]) or grad.dtype != x.dtype:
        raise RuntimeError(f"grad: got {list(grad.shape)} {grad.dtype}, wanted {x.dtype} [{len(index)}, {x.shape[1]}]")
    return combine_rows_backward(library, grad.contiguous(), x.contiguous(), index.contiguous(), _factors(index, weights))
