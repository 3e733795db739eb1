"""Causal attention over rows of tokens on the CPU, forward and backward, without a matrix of scores or masks: the compiled kernel.

Its reference is `mswift.kernels.packed_attention`, which decides for each call which of the two runs. Tiles of 64 x 64 scores live between
two products and nowhere else; what is kept for the backward pass is the output and one number for each query and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mswift.kernels import checks, choice, extension, functions

NAME = "attention"


def _fits(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.device.type != "cpu":
        return "written for the CPU"
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in (torch.float32, torch.bfloat16):
        return "takes float32 and bfloat16"
    if query.shape[-1] % 16 or value.shape[-1] % 16:
        return "takes heads whose width is a multiple of 16"
    wanted = "avx512" if query.dtype == torch.float32 else "avx512_bf16"
    return None if extension.isa_at_least(wanted) else f"needs {wanted} for {query.dtype}"


choice.register(NAME, "causal attention without a matrix of scores or masks, packed rows, windows, sinks", _fits)


def usable(query: Tensor, key: Tensor, value: Tensor, *, softcap: float | None, dropout_p: float) -> bool:
    """Whether the kernel runs for these tensors and options."""
    return softcap is None and dropout_p == 0.0 and choice.compiled(NAME, query, key, value)


def check(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *, scale: float | None, window: int | None, chunk: int | None) -> None:
    """Refuse, by the names of the faces, what does not fit to `key` ``[..., groups, d]``."""
    front, groups, d = tuple(key.shape[:-2]), key.shape[-2], key.shape[-1]
    apart = query.dim() == key.dim() + 1  # the heads of each group in a dim of their own
    checks.expect("query", query, (*front, groups, query.shape[-2], d) if apart else (*front, *query.shape[len(front) : -1], d))
    checks.expect("key", key, (*front, groups, d), query.dtype)
    checks.expect("value", value, (*front, groups, *value.shape[-1:]), query.dtype)
    heads = query.shape[len(front) : -1].numel()
    if query.dim() not in (key.dim(), key.dim() + 1) or not groups or heads % groups:
        raise ValueError(f"query: got {list(query.shape)}, wanted a multiple of {groups} heads, one or some for each group of key")
    if sinks is not None:
        checks.expect("sinks", sinks, (heads,))
    if scale is not None and not scale > 0.0:
        raise ValueError(f"scale: got {scale}, wanted more than 0")
    checks.at_least("window", 1 if window is None else window, 1)
    checks.at_least("chunk", 1 if chunk is None else chunk, 1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * q k^T) v`` of every row of tokens by itself; query head h reads key group h // (heads / groups).

    Args:
        query: ``[s, b, heads, d]``, or ``[s, b, groups, heads of each, d]``, as a fused projection has them. key: ``[s, b, groups, d]``. value:
            ``[s, b, groups, dv]``. Any strides but in the last dim.
        bounds: int32 ``[rows + 1]``, where rows of tokens begin and end along s, in every b; None: all of s is one row.
        scale: factor on the scores, above 0; None: ``d ** -0.5``.
        window: tokens that a query sees at most, itself included. chunk: rows are cut into chunks of so many tokens, and a query sees its own.
        sinks: ``[heads]``, a score in each softmax that has no value.

    Returns:
        ``[s, b, heads, dv]`` in the dtype of `query`.
    """
    if key.dim() != 4:
        checks.expect("key", key, ("s", "b", "groups", "d"))
    check(query, key, value, sinks, scale=scale, window=window, chunk=chunk)
    if bounds is not None:
        checks.expect("bounds", bounds, ("rows + 1",))
        checks.rising("bounds", bounds, query.shape[0])
    else:
        bounds = torch.tensor([0, query.shape[0]], dtype=torch.int32)
    wide_sinks = None if sinks is None else sinks.float()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, _ = torch.ops.mswift.causal_attention(query, key, value, bounds, wide_sinks, scale, window or 0, chunk or 0)
    return out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, sinks, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, bounds, sinks, *output)
    ctx.set_materialize_grads(False)


@functions.backward(NAME)
def _gradients(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    query, key, value, bounds, sinks, out, lse = ctx.saved_tensors
    d_query, d_key, d_value = torch.ops.mswift.causal_attention_backward(grad, query, key, value, out, lse, bounds, *ctx.settings)
    d_sinks = None
    if sinks is not None and ctx.needs_input_grad[4]:
        delta = (grad.float() * out.float()).sum(-1).permute(1, 2, 0)
        d_sinks = -((sinks[:, None] - lse).exp() * delta).sum((0, 2))
    return d_query, d_key, d_value, None, d_sinks, None, None, None


def _shape_of_output(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    s, b, heads = *query.shape[:2], query.shape[2:-1].numel()
    return query.new_empty(s, b, heads, value.shape[-1]), query.new_empty(b, heads, s, dtype=torch.float32)


def _shape_of_gradients(_grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(part.new_empty(part.shape) for part in inputs[:3])


@extension.when_loaded
def _describe() -> None:
    torch.library.register_fake("mswift::causal_attention", _shape_of_output)
    torch.library.register_fake("mswift::causal_attention_backward", _shape_of_gradients)
    torch.library.register_autograd("mswift::causal_attention", _gradients, setup_context=_keep)
