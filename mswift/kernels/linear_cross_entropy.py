"""The cross entropy of a linear head, one loss a token, without logits: label smoothing, z-loss and token weights on top of `linear_log_probs`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.kernels import functions
from mswift.kernels.linear_log_probs import IGNORE, check, check_labels, rows_here, score, spread_out
from mswift.kernels.linear_softmax import Limits, capped_logits, chunk_rows
from mswift.runtime.precision import widen


class _SumOfGradients(torch.autograd.Function):
    """Its argument; the gradient is summed over ranks, once for all that the argument is used for."""

    @staticmethod
    @functions.forward
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @functions.backward("linear_cross_entropy")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _MeanCappedLogit(torch.autograd.Function):
    """What the capped logits here add to each token's mean over the whole vocabulary, in chunks; they are computed again for the gradient."""

    @staticmethod
    @functions.forward
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, limits: Limits, vocab: int) -> Tensor:
        wide, short = widen(weight)[: limits.valid], None if bias is None else bias[: limits.valid]
        means = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        step = chunk_rows(weight.shape[0])
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            means[rows] = capped_logits(hidden[rows], wide, short, limits).sum(-1).div_(vocab)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rest = (limits, vocab)
        return means

    @staticmethod
    @functions.backward("linear_cross_entropy")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        limits, vocab = ctx.rest
        wide, short = widen(weight)[: limits.valid], None if bias is None else bias[: limits.valid]
        sizes = (hidden.shape, weight.shape, weight.shape[:1])
        sums = [torch.zeros(size, device=hidden.device) if wanted else None for size, wanted in zip(sizes, ctx.needs_input_grad)]
        step = chunk_rows(weight.shape[0])
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = capped_logits(hidden[rows], wide, short, limits)
            gradient = logits.div_(limits.cap).square_().neg_().add_(1.0).mul_(grads[0][rows, None] * (limits.scale / vocab))
            if sums[2] is not None:
                sums[2][: limits.valid] += gradient.sum(0)
            gradient = gradient.to(wide.dtype)
            if sums[0] is not None:
                sums[0][rows] = (gradient @ wide).float()
            if sums[1] is not None:
                sums[1][: limits.valid] += gradient.t() @ hidden[rows].to(wide.dtype)
        return *(None if part is None or to is None else part.to(to.dtype) for part, to in zip(sums, (hidden, weight, bias))), None, None


class _MeanLogit(torch.autograd.Function):
    """What the logits here (without a cap) add to each token's mean over the whole vocabulary: one product with the sum of the weight's rows."""

    @staticmethod
    @functions.forward
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, limits: Limits, vocab: int) -> Tensor:
        total = weight[: limits.valid].sum(0, dtype=torch.float32).mul_(limits.scale / vocab)
        means = hidden.float() @ total
        if bias is not None:
            means = means + bias[: limits.valid].float().sum() * (limits.scale / vocab)
        ctx.save_for_backward(hidden if weight.requires_grad else None, total)
        ctx.shape, ctx.dtypes, ctx.rest = (
            weight.shape,
            (hidden.dtype, weight.dtype, None if bias is None else bias.dtype),
            (limits, vocab),
        )
        return means

    @staticmethod
    @functions.backward("linear_cross_entropy")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, total = ctx.saved_tensors
        limits, vocab = ctx.rest
        grad_hidden, grad_weight, grad_bias = None, None, None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.outer(grads[0], total).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            row = (grads[0] @ hidden.float()).mul_(limits.scale / vocab).to(ctx.dtypes[1])
            grad_weight = torch.zeros(ctx.shape, dtype=ctx.dtypes[1], device=row.device)
            grad_weight[: limits.valid] = row
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros(ctx.shape[:1], dtype=ctx.dtypes[2], device=total.device)
            grad_bias[: limits.valid] = grads[0].sum() * (limits.scale / vocab)
        return grad_hidden, grad_weight, grad_bias, None, None


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORE,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
    reduce_grad: bool = True,
) -> Tensor:
    """Cross entropy of ``softmax(hidden_states @ weight.T + bias)`` with the labels, one loss for each token.

    Args:
        token_weights: ``[...]``, a factor on each token's loss, not differentiated; a token of weight zero costs nothing.
        label_smoothing: share of the target that is spread evenly over the vocabulary (torch's definition).
            With a `softcap` it costs the products once more.
        z_loss: factor of the squared log-sum-exp that is added to the loss (PaLM, equation in section 5).
        hidden_states, weight, labels, bias, ignore_index, vocab_size, softcap, logit_scale, group, reduce_grad: as for `linear_log_probs`.

    Returns:
        fp32 ``[...]``; zero where a token is ignored. The caller sums and divides.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    check(hidden_states, weight, labels, bias, softcap)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, wanted at least 0 and less than 1")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights: got {tuple(token_weights.shape)}, wanted {tuple(labels.shape)}, one for each label")
    group = group if group is not None and group.size() > 1 else None
    first, valid = rows_here(weight, vocab_size, group)
    limits = Limits(valid, logit_scale, softcap or 0.0)
    flat_labels = labels.reshape(-1)
    chosen = flat_labels != ignore_index
    if token_weights is not None:
        chosen &= token_weights.reshape(-1) != 0
    scored = chosen.nonzero().squeeze(1)
    target = flat_labels[scored]
    check_labels(target, weight, vocab_size, group)
    hidden, weight, bias = functions.in_autocast_dtype(hidden_states.reshape(-1, hidden_states.shape[-1]), weight, bias)
    if len(scored) != len(flat_labels):
        hidden = hidden.index_select(0, scored)
    along = None
    if label_smoothing:
        vocab = vocab_size or weight.shape[0] * (1 if group is None else group.size())
        if group is not None and reduce_grad:
            hidden, reduce_grad = _SumOfGradients.apply(hidden, group), False
        along = (_MeanLogit if softcap is None else _MeanCappedLogit).apply(hidden, weight, bias, limits, vocab)
    (log_probs, _, lse), mean = score(hidden, weight, target, bias, limits, first, group, reduce_grad, entropy_grad=False, along=along)
    losses = -log_probs
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses + label_smoothing * (lse - mean)
    if z_loss:
        losses = losses + z_loss * lse.square()
    if token_weights is not None:
        losses = losses * token_weights.detach().reshape(-1)[scored].float()
    return spread_out(losses, scored, labels)
