"""A frozen linear layer with a low-rank adapter in one differentiable step.

The adapter is added into the base product (forward) and into the input gradient (backward) by `addmm_`, so that no activation-sized
temporary is made for it. Dropout is a function of a seed: the mask is drawn again in the backward pass and never stored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.runtime.precision import widen


def keep_mask(shape: tuple[int, int], columns: tuple[int, int], p: float, seed: int, like: Tensor) -> Tensor:
    """The inverted-dropout factors (0 or 1/(1-p)) of columns [start, stop) of a ``shape`` activation; beyond its width they are 0.

    A rank that holds some columns of a row-parallel input draws the whole mask and keeps its part, so that the mask, and with it the
    loss, does not depend on the layout.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    # Eight bits a draw: the rate is a multiple of 1/256, and the scale below is that of the rate in use.
    draws = torch.empty(shape, dtype=torch.uint8, device=like.device).random_(0, 256, generator=generator)
    threshold = max(1, min(255, round(p * 256)))
    kept = (draws[:, columns[0] : columns[1]] >= threshold).to(like.dtype).mul_(256.0 / (256 - threshold))
    missing = columns[1] - columns[0] - kept.shape[1]
    return torch.nn.functional.pad(kept, (0, missing)) if missing else kept


def _mask_of(flat: Tensor, dropout: tuple[float, int, int, int]) -> Tensor | None:
    p, seed, first, full = dropout
    return keep_mask((len(flat), full), (first, first + flat.shape[1]), p, seed, flat) if p > 0 else None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        dropout: tuple[float, int, int, int],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        flat = widen(x.reshape(-1, x.shape[-1]))
        wide_weight = widen(weight)
        output = torch.mm(flat, wide_weight.t()) if bias is None else torch.addmm(widen(bias), flat, wide_weight.t())
        mask = _mask_of(flat, dropout)
        down = torch.mm(flat if mask is None else flat * mask, widen(lora_a).t())
        output.addmm_(down, widen(lora_b).t(), alpha=scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, down)
        ctx.scale, ctx.dropout, ctx.group = scale, dropout, group
        ctx.needs_bias = bias is not None and bias.requires_grad
        return output.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, down = ctx.saved_tensors
        flat, grad_output = widen(x.reshape(-1, x.shape[-1])), widen(grads[0].reshape(-1, weight.shape[0]))
        mask = _mask_of(flat, ctx.dropout)
        grad_down = torch.mm(grad_output, widen(lora_b)).mul_(ctx.scale)
        grad_x, sent = None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_output, widen(weight))
            if mask is None:
                grad_x.addmm_(grad_down, widen(lora_a))
            else:
                grad_x.addcmul_(torch.mm(grad_down, widen(lora_a)), mask)
            grad_x = grad_x.to(x.dtype).view(x.shape)
            if ctx.group is not None and ctx.group.size() > 1:
                sent = dist.all_reduce(grad_x, group=ctx.group, async_op=True)  # under way while the adapter's gradients are computed
        grad_b = torch.mm(grad_output.t(), down).mul_(ctx.scale).to(lora_b.dtype)
        grad_a = torch.mm(grad_down.t(), flat if mask is None else flat * mask).to(lora_a.dtype)
        grad_bias = grad_output.sum(0).to(grads[0].dtype) if ctx.needs_bias else None
        if sent is not None:
            sent.wait()
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    first_column: int = 0,
    full_width: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``x @ weight.T + bias + scale * (dropout(x) @ lora_a.T) @ lora_b.T``; `weight` is frozen and gets no gradient.

    Args:
        x: ``[..., in]``. weight: ``[out, in]``. bias: ``[out]`` or None. lora_a: ``[rank, in]``. lora_b: ``[out, rank]``; one dtype for all.
        scale: factor of the adapter. dropout_p: rate in [0, 1). seed: names the dropout mask.
        first_column, full_width: where `x` lies in the whole activation if only some of its columns are here (row-parallel input);
            columns at or beyond the full width are zeros (padded heads).
        group: sum the gradient of `x` over these ranks, as a column-parallel layer needs it (each rank sees its part of the output).

    Returns:
        ``[..., out]`` of the dtype of `x`. For a row-parallel layer this is a partial sum: the caller reduces it. The gradient of the factor
        that every rank holds whole (`lora_a` of a column-parallel layer, `lora_b` of a row-parallel one) is a partial sum as well; it is
        best reduced once a step, for all layers together.
    """
    dropout = (dropout_p, seed, first_column, x.shape[-1] if full_width is None else full_width)
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale, dropout, group)
