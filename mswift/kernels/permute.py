"""Rows of tokens to the order of their experts and back, differentiable; each direction is the other's gradient, in a fixed order of sums."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from mswift.kernels import checks, choice, cuda_operators, extension, functions

NAME = "permute"


def _fits(x: Tensor, *_: Tensor) -> str | None:
    return cuda_operators.hindrance(x) if x.device.type == "cuda" else "plain torch is as fast on a CPU"


choice.register(NAME, "tokens to the order of their experts and back", _fits, on_cpu=False, on_cuda=True)


def _gather(x: Tensor, source: Tensor) -> Tensor:
    if choice.compiled(NAME, x):
        return torch.ops.mswift.gather_rows(x, source)
    return x[source.clamp(min=0)].masked_fill_((source < 0)[:, None], 0.0)


def _combine(x: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    if choice.compiled(NAME, x):
        return torch.ops.mswift.combine_rows(x, places, weights)
    factors = (places >= 0).float() if weights is None else weights * (places >= 0)
    total = torch.zeros(len(places), x.shape[1], device=x.device)
    for column, factor in zip(places.clamp(min=0).unbind(1), factors.unbind(1), strict=True):
        total.addcmul_(x[column].float(), factor[:, None])
    return total.to(x.dtype)


def _combine_gradients(grad: Tensor, x: Tensor, places: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if choice.compiled(NAME, x):
        return torch.ops.mswift.combine_rows_backward(grad, x, places, weights)
    there, wide = places >= 0, grad.float()
    grad_x, grad_weights = x.new_zeros(len(x) + 1, x.shape[1]), torch.zeros(places.shape, device=x.device)
    for number, column in enumerate(places.unbind(1)):
        scaled = wide if weights is None else weights[:, number, None] * wide
        grad_x[column.masked_fill(column < 0, len(x))] = scaled.to(x.dtype)  # the last row takes what has no place
        grad_weights[:, number] = (wide * x[column.clamp(min=0)].float()).sum(1) * there[:, number]
    return grad_x[:-1], grad_weights


class _Permute(torch.autograd.Function):
    @staticmethod
    @functions.forward
    def forward(ctx: Any, x: Tensor, places: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places)
        tokens = torch.arange(len(places), device=x.device)[:, None].expand_as(places)
        source = torch.full((rows + 1,), -1, device=x.device)  # the last one takes what has no place
        return _gather(x, source.scatter_(0, places.masked_fill(places < 0, rows).reshape(-1), tokens.reshape(-1))[:rows])

    @staticmethod
    @functions.backward(NAME)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _combine(grads[0].contiguous(), ctx.saved_tensors[0], None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    @functions.forward
    def forward(ctx: Any, x: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, places, weights)
        return _combine(x, places, weights)

    @staticmethod
    @functions.backward(NAME)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, places, weights = ctx.saved_tensors
        grad_x, grad_weights = _combine_gradients(grads[0].contiguous(), x, places, weights)
        return grad_x, None, grad_weights if ctx.needs_input_grad[2] else None


def _check(x: Tensor, places: Tensor, rows: int) -> None:
    checks.expect("x", x, ("rows", "columns"))
    checks.expect("places", places, ("tokens", "experts of a token"), torch.int64)
    checks.within("places", places, -sys.maxsize, rows - 1)


def permute(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """``out[places[t, k]] = x[t]``, zeros where no token goes.

    Args:
        x: ``[tokens, columns]``. places: int64 ``[tokens, k]``, all different, or negative: the token was dropped there. rows: of the result.
    """
    _check(x, places, rows)
    checks.expect("places", places, (len(x), places.shape[1]))
    return _Permute.apply(x, places, rows)


def unpermute(x: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """``out[t] = sum_k weights[t, k] x[places[t, k]]``, summed in fp32 and rounded once.

    Args:
        x: ``[rows, columns]``. places: as `permute` takes them. weights: fp32 ``[tokens, k]``, None for ones.
    """
    _check(x, places, len(x))
    if weights is not None:
        checks.expect("weights", weights, tuple(places.shape), torch.float32)
    return _Unpermute.apply(x, places, weights)


@extension.when_loaded
def _describe() -> None:
    fake = torch.library.register_fake
    fake("mswift::gather_rows", lambda x, index: x.new_empty(index.shape[0], x.shape[1]))
    fake("mswift::combine_rows", lambda x, index, weights: x.new_empty(index.shape[0], x.shape[1]))
    fake(
        "mswift::combine_rows_backward",
        lambda grad, x, index, weights: (x.new_empty(x.shape), x.new_empty(index.shape, dtype=torch.float32)),
    )
