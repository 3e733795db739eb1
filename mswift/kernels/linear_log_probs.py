"""Log-probabilities of given tokens straight from hidden states: the logits of a batch never exist as a whole.

Vocabulary-parallel, with one exchange of statistics; tokens without a label cost nothing: they are gathered out before the product. The work
is done by `linear_softmax`, compiled or plain torch; here the parts of a vocabulary become log-probabilities, and gradients follow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.kernels import checks, functions
from mswift.kernels.linear_softmax import Kept, Limits, Statistics, keeping_statistics, keeps, kept_weight_gradient, statistics, weight_gradient

IGNORE = -100
"""Label of a token that is not scored (torch's own ignore_index)."""


class LogProbs(NamedTuple):
    """Of each token, fp32, zero where it is not scored: log-probability of its label, entropy of the distribution, log-sum-exp of the logits."""

    log_probs: Tensor
    entropy: Tensor
    lse: Tensor


class _Setting(NamedTuple):
    limits: Limits
    first: int  # this rank's first row in the whole vocabulary
    group: dist.ProcessGroup | None
    reduce_grad: bool
    entropy_grad: bool
    keep: bool  # the weight's gradient will be wanted, and its memory may be had now


class _Parts(NamedTuple):
    """What the statistics of all ranks say: fp32 ``[tokens]``."""

    log_probs: Tensor
    entropy: Tensor
    lse: Tensor
    own: Tensor  # factor that turns this rank's sums of e into sums of probabilities
    label_prob: Tensor
    other_prob: Tensor  # 1 - label_prob, exact also where that is tiny
    total: Tensor  # the sum over ranks of what was sent along; empty


def _combine(mine: Statistics, along: Tensor | None, group: dist.ProcessGroup | None) -> _Parts:
    """Put the ranks' sums together: (reference, others, spread, label logit) of each, exchanged once, with `along` if there is one."""
    packed = torch.stack((mine.reference, mine.others, mine.spread, mine.label, *(() if along is None else (along,))))
    if group is None:
        every = packed[None]
    else:
        gathered = [torch.empty_like(packed) for _ in range(group.size())]
        dist.all_gather(gathered, packed, group=group)
        every = torch.stack(gathered)
    reference, others, spread, label = every[:, :4].unbind(1)
    label = label.amax(0)
    peak = reference.amax(0)
    factors = (reference - peak).exp()
    others_lse = peak + (others * factors).sum(0).log()  # -inf where the label is all there is
    margin = others_lse - label
    log_probs = -torch.nn.functional.softplus(margin, threshold=60.0)
    lse = torch.logaddexp(others_lse, label)
    label_prob, other_prob = log_probs.exp(), torch.sigmoid(margin)
    weights = (reference - lse).exp()
    entropy = (weights * ((lse - reference) * others - spread)).sum(0) - label_prob * log_probs
    return _Parts(log_probs, entropy, lse, (mine.reference - lse).exp(), label_prob, other_prob, every[:, 4:].sum(0).view(-1))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    @functions.forward
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, along: Tensor | None, setting: _Setting
    ) -> tuple[Tensor, ...]:
        limits = setting.limits
        local = labels - setting.first
        local = local.masked_fill((local < 0) | (local >= limits.valid), -1)
        wants_hidden = ctx.needs_input_grad[0]
        kept: tuple[Tensor | None, ...] = (None, None, None)
        if setting.keep:
            mine, kept = keeping_statistics(hidden, weight, bias, local, limits, wants_hidden)
        else:
            mine = statistics(hidden, weight, bias, local, limits, (2 if setting.entropy_grad else 1) if wants_hidden else 0)
        parts = _combine(mine, along, setting.group)
        ctx.setting, ctx.spent = setting, False
        ctx.trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        means: tuple[Tensor, ...] = ()
        if wants_hidden:
            mean = mine.mean.mul_(parts.own[:, None])
            if setting.entropy_grad:  # sum of p (log p + entropy) slope row, over all rows but the label's
                mine.mean2.mul_(parts.own[:, None]).addcmul_(mean, (mine.reference - parts.lse + parts.entropy)[:, None])
                means = (mean.to(hidden.dtype), mine.mean2.to(hidden.dtype))
            else:
                means = (mean.to(hidden.dtype),)
        ctx.mark_non_differentiable(*(() if setting.entropy_grad else (parts.entropy,)), *(() if along is not None else (parts.total,)))
        ctx.save_for_backward(
            *(hidden if ctx.trained else None, weight, bias, local, mine.label, *parts[:3], parts.label_prob, parts.other_prob, *kept, *means)
        )
        return parts.log_probs, parts.entropy, parts.lse, parts.total

    @staticmethod
    @functions.backward("linear_log_probs")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, local, label, log_probs, entropy, lse, label_prob, other_prob, *rest = ctx.saved_tensors
        kept, means = Kept(*rest[:3]), rest[3:]
        setting: _Setting = ctx.setting
        to_log_prob, to_entropy, to_lse = (grad.float() for grad in grads[:3])
        if not setting.entropy_grad:
            to_entropy = torch.zeros_like(to_log_prob)
        grad_hidden, grad_weight, grad_bias = None, None, None
        at_label = to_log_prob * other_prob + label_prob * (to_lse - to_entropy * (log_probs + entropy))
        if setting.limits.cap:
            at_label = at_label * (1.0 - (label / setting.limits.cap).clamp(min=-1.0) ** 2)
        at_label = at_label.masked_fill(local < 0, 0.0)
        if ctx.needs_input_grad[0]:
            grad_hidden = weight.index_select(0, local.clamp(min=0)).float().mul_(at_label[:, None])
            grad_hidden.addcmul_(means[0], (to_lse - to_log_prob)[:, None])
            if setting.entropy_grad:
                grad_hidden.addcmul_(means[1], -to_entropy[:, None])
            grad_hidden = grad_hidden.mul_(setting.limits.scale).to(means[0].dtype)
            if setting.group is not None and setting.reduce_grad:
                dist.all_reduce(grad_hidden, group=setting.group)
        if ctx.trained:
            if setting.keep and not ctx.spent:  # a second backward pass finds a gradient there, which is no longer ours
                ctx.spent = True
                factors = torch.stack((lse, to_lse - to_log_prob, to_log_prob, at_label))
                grad_weight, grad_bias = kept_weight_gradient(hidden, weight, bias, local, factors, kept, setting.limits)
            else:
                a = to_lse - to_log_prob - to_entropy * (entropy - lse)
                factors = torch.stack((lse, a, to_entropy, to_log_prob))
                grad_weight, grad_bias = weight_gradient(hidden, weight, bias, local, factors, setting.limits)
            grad_bias = grad_bias.to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight if ctx.needs_input_grad[1] else None, grad_bias, None, grads[3] if ctx.needs_input_grad[4] else None, None


def check(hidden_states: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Refuse what does not fit together, by name."""
    if hidden_states.shape[:-1] != labels.shape:
        raise ValueError(f"labels: got {tuple(labels.shape)}, wanted {tuple(hidden_states.shape[:-1])}, one for each of hidden_states")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: got {labels.dtype}, wanted torch.int64")
    if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
        raise ValueError(f"weight: got {tuple(weight.shape)}, wanted [vocabulary, {hidden_states.shape[-1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got {tuple(bias.shape)}, wanted [{weight.shape[0]}]")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: got {softcap}, wanted a positive number or None")


def rows_here(weight: Tensor, vocab_size: int | None, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(first row, number of rows that are no padding) of this rank's slice of the vocabulary."""
    first = 0 if group is None else group.rank() * weight.shape[0]
    return first, weight.shape[0] if vocab_size is None else max(0, min(weight.shape[0], vocab_size - first))


def check_labels(labels: Tensor, weight: Tensor, vocab_size: int | None, group: dist.ProcessGroup | None) -> None:
    """Refuse labels of scored tokens that are not in the vocabulary, where they can be read at no cost, and a vocabulary that is not there."""
    rows = weight.shape[0] * (1 if group is None else group.size())
    if vocab_size is not None and not 1 <= vocab_size <= rows:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted 1 to {rows}, the rows of weight on all ranks")
    checks.within("labels", labels, 0, (vocab_size or rows) - 1)


def score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    limits: Limits,
    first: int,
    group: Any,
    reduce_grad: bool,
    entropy_grad: bool,
    along: Tensor | None = None,
) -> tuple[LogProbs, Tensor]:
    """`linear_log_probs` of flat tokens that are all scored, with everything resolved; and the sum over ranks of `along`, fp32 ``[tokens]``."""
    wide = hidden if hidden.dtype == weight.dtype else hidden.to(weight.dtype)
    keep = torch.is_grad_enabled() and weight.requires_grad and not entropy_grad and keeps(wide, weight, limits)
    setting = _Setting(limits, first, group, reduce_grad, entropy_grad, keep)
    *values, total = _LinearLogProbs.apply(wide, weight, bias, labels, along, setting)
    return LogProbs(*values), total


def linear_log_probs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_grad: bool = True,
    entropy_grad: bool = False,
) -> LogProbs:
    """Log-probability of each label under ``softmax(hidden_states @ weight.T + bias)``, with entropy and log-sum-exp; differentiable.

    Args:
        hidden_states: ``[..., hidden]``, the same on every rank of `group`.
        weight: ``[vocabulary on this rank, hidden]``; equal slices in rank order. No gradient is computed for it when it is frozen.
        labels: int64 ``[...]``; `ignore_index` where a token is not scored. One that is not in the vocabulary is refused on a CPU; on a device,
            where looking would mean to wait, its log-probability is -inf and its entropy nan.
        bias: ``[vocabulary on this rank]``, added to the product.
        vocab_size: rows at or beyond it are padding and have probability zero; None: no padding.
        logit_scale: factor on the logits. softcap: after it, their limit: ``softcap * tanh(logits / softcap)``.
        group: the ranks that share the vocabulary; None: one rank holds it all.
        reduce_grad: sum the gradient of the hidden states over `group`; False leaves each rank its own part (sequence parallelism adds them).
        entropy_grad: whether the entropy is differentiable; it costs one product more.

    Returns:
        fp32 ``[...]`` each; zero where the label is `ignore_index`.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    check(hidden_states, weight, labels, bias, softcap)
    group = group if group is not None and group.size() > 1 else None
    first, valid = rows_here(weight, vocab_size, group)
    flat_labels = labels.reshape(-1)
    scored = (flat_labels != ignore_index).nonzero().squeeze(1)
    target = flat_labels[scored]
    check_labels(target, weight, vocab_size, group)
    hidden, weight, bias = functions.in_autocast_dtype(hidden_states.reshape(-1, hidden_states.shape[-1]), weight, bias)
    if len(scored) != len(flat_labels):
        hidden = hidden.index_select(0, scored)
    values, _ = score(hidden, weight, target, bias, Limits(valid, logit_scale, softcap or 0.0), first, group, reduce_grad, entropy_grad)
    return LogProbs(*(spread_out(value, scored, labels) for value in values))


def spread_out(values: Tensor, scored: Tensor, labels: Tensor) -> Tensor:
    """`values` of the scored tokens at their places in the shape of `labels`, zero elsewhere."""
    if len(scored) == labels.numel():
        return values.reshape(labels.shape)
    return torch.zeros(labels.numel(), dtype=values.dtype, device=values.device).index_put((scored,), values).reshape(labels.shape)
