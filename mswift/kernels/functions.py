"""What every gradient written by hand has in common: it computes in the dtypes of its operands, and it cannot be differentiated itself.

Autocast is off within: the faces cast their operands, and a product that is widened for the processor must not be narrowed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_autocast_dtype(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The operands of a face in the dtype of a surrounding autocast region, if there is one; as in torch's own operators, fp64 is left alone."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if part is None else part.to(dtype) for part in (x, *others))


def _without_autocast(function: Callable[..., T], ctx: Any, arguments: tuple[Any, ...]) -> T:
    first = arguments[0]
    device = (first if isinstance(first, Tensor) else next(part for part in arguments if isinstance(part, Tensor))).device.type
    if not torch.is_autocast_enabled(device):
        return function(ctx, *arguments)
    with torch.autocast(device, enabled=False):
        return function(ctx, *arguments)


def forward(function: Callable[..., T]) -> Callable[..., T]:
    """For the forward of an autograd.Function."""

    @functools.wraps(function)
    def run(ctx: Any, *arguments: Any) -> T:
        return _without_autocast(function, ctx, arguments)

    return run


def backward(name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """For its backward, or for the gradient of an operator, which would be a constant to a second derivative without a word.

    Raises:
        RuntimeError: with this name, where the gradient is asked for in order to differentiate it.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def run(ctx: Any, *grads: Any) -> T:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiled graph refuses by itself
                raise RuntimeError(f"{name} has no second derivative: got create_graph=True, wanted a gradient that is not differentiated")
            return _without_autocast(function, ctx, grads)

        return run

    return decorate
