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
    library: Library, grad: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor, *, zero_centred: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (that of the norm plus `grad_sum`) and, in fp32, of the weight."""
    rows, cols = summed.shape
    grad_x, partial = torch.empty_like(summed), summed.new_empty(abi.NORM_BLOCKS, cols, dtype=torch.float32)
    grad_weight = summed.new_empty(cols, dtype=torch.float32)
    arguments = (dtype_of(grad), grad, grad_sum, summed, weight, rstd, grad_x, partial, grad_weight, rows, cols, int(zero_centred))
    library.call("mswift_rms_norm_backward", grad, *arguments)
    return grad_x, grad_weight


def gated(library: Library, gate_up: Tensor, kind: str, *, limit: float = 0.0, alpha: float = 1.0) -> Tensor:
    """``act(gate) * up`` of ``[rows, 2 * cols]``, gate first; `kind` is a key of `cuda_abi.ACTIVATIONS`."""
    rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
    out, gate = gate_up.new_empty(rows, cols), pointer(gate_up) or 0
    sizes = (rows, cols, 2 * cols, limit, alpha)
    library.call("mswift_gated_forward", gate_up, dtype_of(gate_up), abi.ACTIVATIONS[kind], gate, gate + cols * gate_up.element_size(), out, *sizes)
    return out


def gated_backward(library: Library, grad: Tensor, gate_up: Tensor, kind: str, *, limit: float = 0.0, alpha: float = 1.0) -> Tensor:
    """The gradient of both halves."""
    rows, cols = grad.shape
    out, width = torch.empty_like(gate_up), cols * gate_up.element_size()
    gate, into = pointer(gate_up) or 0, pointer(out) or 0
    arguments = (dtype_of(grad), abi.ACTIVATIONS[kind], grad, gate, gate + width, into, into + width, rows, cols, 2 * cols, limit, alpha)
    library.call("mswift_gated_backward", grad, *arguments)
    return out


def rope_(library: Library, x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None, *, interleaved: bool = False, sign: int = 1) -> Tensor:
    """Rotate ``[tokens, heads, dim]`` in place, a view of a wider tensor perhaps. cosine, sine: fp32 ``[positions, rotary / 2]``; sign -1: back."""
    tokens, heads, dim = x.shape
    assert x.stride(2) == 1
    where = (tokens, heads, dim, 2 * cosine.shape[1], x.stride(0), x.stride(1), int(interleaved), sign)
    library.call("mswift_rope", x, dtype_of(x), x.data_ptr(), x.data_ptr(), cosine, sine, positions, *where)
    return x


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
