"""Log-probabilities of given tokens straight from hidden states: the logits of a batch never exist as a whole.

Plain torch, vocabulary-parallel, chunked over tokens. Tokens without a label cost nothing: they are gathered out before the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.runtime.precision import widen

IGNORE = -100
"""Label of a token that is not scored (torch's own ignore_index)."""

_CHUNK_BYTES = 32 * 2**20  # fp32 logits of one chunk: few enough bytes to stay near the cores, enough rows to feed the matrix product


def _chunk_rows(vocab: int) -> int:
    return max(16, _CHUNK_BYTES // (4 * vocab))


class _Limits(NamedTuple):
    """What is done to the logits: tokens from `size` on are padding, a factor, a limit by tanh."""

    size: int | None
    scale: float
    cap: float | None


class _Vocabulary:
    """The slice [first, first + rows) of the vocabulary that this rank holds."""

    def __init__(self, weight: Tensor, limits: _Limits, group: dist.ProcessGroup | None) -> None:
        size, self.scale, self.cap = limits
        self.group = group if group is not None and group.size() > 1 else None
        rank = self.group.rank() if self.group is not None else 0
        self.first = rank * weight.shape[0]
        self.padding_from = weight.shape[0] if size is None else max(0, min(weight.shape[0], size - self.first))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden.to(weight.dtype) @ weight.t()).float()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        logits[:, self.padding_from :] = -torch.inf
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d products for these logits, without `scale`; None where it is one everywhere."""
        if self.cap is None:
            return None
        slope = 1.0 - (logits / self.cap).square_()
        slope[:, self.padding_from :] = 0.0
        return slope

    def locate(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Local index of each label (0 where it is another rank's) and a mask of those that are here."""
        local = labels - self.first
        here = (local >= 0) & (local < rows)
        return local.masked_fill(~here, 0), here

    def normaliser(self, logits: Tensor, target: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """(log-sum-exp, logit of the label) of each row over the whole vocabulary, both fp32 ``[rows]``."""
        peak = logits.amax(-1)
        if self.group is not None:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        total = torch.sub(logits, peak[:, None]).exp_().sum(-1)
        label_logit = logits.gather(1, target[:, None]).squeeze(1).masked_fill(~here, 0.0)
        if self.group is not None:
            both = torch.stack((total, label_logit))
            dist.all_reduce(both, group=self.group)
            total, label_logit = both.unbind()
        return peak + total.log(), label_logit


def _minus_softmax_plus_one_hot(vocabulary: _Vocabulary, logits: Tensor, lse: Tensor, target: Tensor, here: Tensor) -> Tensor:
    """d log_prob / d products, written over `logits`: the one-hot label minus the probabilities, times what scale and cap add."""
    slope = vocabulary.slope(logits)
    gradient = logits.sub_(lse[:, None]).exp_().neg_()
    gradient.scatter_add_(1, target[:, None], here.to(gradient.dtype)[:, None])
    if slope is not None:
        gradient.mul_(slope)
    return gradient if vocabulary.scale == 1.0 else gradient.mul_(vocabulary.scale)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, limits: _Limits, group: Any, reduce_grad: bool) -> Tensor:
        vocabulary = _Vocabulary(weight, limits, group)
        step = _chunk_rows(weight.shape[0])
        wide = widen(weight)
        lse = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        log_probs = torch.empty_like(lse)
        frozen = not weight.requires_grad
        # With a frozen head the gradient of each token's log-probability is known up to a factor: keep it, and never come back.
        unit_gradient = torch.empty_like(hidden) if frozen and hidden.requires_grad else None
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            logits = vocabulary.logits(hidden[rows], wide)
            target, here = vocabulary.locate(labels[rows], weight.shape[0])
            lse[rows], label_logit = vocabulary.normaliser(logits, target, here)
            log_probs[rows] = label_logit - lse[rows]
            if unit_gradient is not None:
                unit_gradient[rows] = _minus_softmax_plus_one_hot(vocabulary, logits, lse[rows], target, here).to(wide.dtype) @ wide
        ctx.vocabulary, ctx.step, ctx.reduce_grad = vocabulary, step, reduce_grad
        ctx.save_for_backward(unit_gradient) if frozen else ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.frozen = frozen
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = grads[0]
        if ctx.frozen:
            (unit_gradient,) = ctx.saved_tensors
            grad_hidden, grad_weight = unit_gradient * grad_output[:, None].to(unit_gradient.dtype), None
        else:
            grad_hidden, grad_weight = _backward_trained(ctx, grad_output)
        if ctx.vocabulary.group is not None and ctx.reduce_grad:
            dist.all_reduce(grad_hidden, group=ctx.vocabulary.group)
        return grad_hidden, grad_weight, None, None, None, None


def _backward_trained(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Recompute the logits chunk by chunk; the head's gradient is accumulated in fp32 however many chunks there are."""
    hidden, weight, labels, lse = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    wide = widen(weight)
    for start in range(0, len(labels), ctx.step):
        rows = slice(start, start + ctx.step)
        logits = ctx.vocabulary.logits(hidden[rows], wide)
        target, here = ctx.vocabulary.locate(labels[rows], weight.shape[0])
        gradient = _minus_softmax_plus_one_hot(ctx.vocabulary, logits, lse[rows], target, here).mul_(grad_output[rows][:, None]).to(wide.dtype)
        grad_hidden[rows] = gradient @ wide
        grad_weight += gradient.t() @ hidden[rows].to(wide.dtype)
    return grad_hidden, grad_weight.to(weight.dtype)


def linear_log_probs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_grad: bool = True,
) -> Tensor:
    """Log-probability of each label under ``softmax(hidden_states @ weight.T)``, differentiable in both factors.

    Args:
        hidden_states: ``[..., hidden]``, the same on every rank of `group`.
        weight: ``[vocabulary on this rank, hidden]``; equal slices in rank order. No gradient is computed for it when it is frozen.
        labels: int64 ``[...]``; `IGNORE` where a token is not scored.
        vocab_size: rows at or beyond it are padding and have probability zero; None: no padding.
        logit_scale: factor on the logits. softcap: after it, their limit: ``softcap * tanh(logits / softcap)``.
        group: the ranks that share the vocabulary; None: one rank holds it all.
        reduce_grad: sum the gradient of the hidden states over `group`; False leaves each rank its own part (sequence parallelism adds them).

    Returns:
        fp32 ``[...]``; zero where the label is `IGNORE`.
    """
    flat_labels = labels.reshape(-1)
    scored = (flat_labels != IGNORE).nonzero().squeeze(1)
    flat_hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    if len(scored) != len(flat_labels):
        flat_hidden = flat_hidden.index_select(0, scored)
    values = _LinearLogProbs.apply(flat_hidden, weight, flat_labels[scored], _Limits(vocab_size, logit_scale, softcap), group, reduce_grad)
    result = torch.zeros(flat_labels.shape, dtype=torch.float32, device=values.device)
    return result.index_put((scored,), values).reshape(labels.shape)
