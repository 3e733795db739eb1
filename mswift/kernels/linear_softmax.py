"""The softmax over ``hidden @ weight.T`` as two operators that never store it: kernels where they fit, chunks of plain torch elsewhere.

`statistics` gives for each token what its log-probabilities need and, on request, the rows of the weight averaged under the softmax (which
is the gradient of the log-sum-exp). `weight_gradient` gives the gradient of the weight, summed in fp32 over all tokens and rounded once.
`keeping_statistics` takes the memory of that gradient early and keeps logits in it, which `kept_weight_gradient` need not compute again.
Nothing here knows of ranks: `linear_log_probs` puts the parts of a vocabulary together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mswift.kernels import choice, cuda_operators, extension
from mswift.runtime.precision import widen

NAME = "linear_cross_entropy"

_CHUNK_BYTES = 32 * 2**20  # fp32 logits of one chunk: few enough bytes to stay near the cores, enough rows to feed the matrix product
_LOWEST = -1e30
_ROOM = 16 * 2**20  # bytes of logits that are kept for the weight's gradient besides those that its own memory holds


class Limits(NamedTuple):
    """What is done to the products: rows from `valid` on are padding, a factor, a limit by tanh (0: none)."""

    valid: int
    scale: float
    cap: float


class Statistics(NamedTuple):
    """Of each token, fp32 ``[tokens]``; sums run over all valid rows but the label's.

    reference: near the largest logit. others: sum of e = exp(logit - reference). spread: sum of e (logit - reference). label: the label's logit,
    -inf where it is not among these rows. mean: ``[tokens, hidden]`` fp32, sum of e * slope * row; mean2: the same with (logit - reference) e;
    empty where they were not asked for.
    """

    reference: Tensor
    others: Tensor
    spread: Tensor
    label: Tensor
    mean: Tensor
    mean2: Tensor


class Kept(NamedTuple):
    """Logits that wait for the weight's gradient. memory: of that gradient. more: beside it. references: what the logits are relative to."""

    memory: Tensor
    more: Tensor
    references: Tensor


def _named(stats: Tensor, mean: Tensor, mean2: Tensor) -> Statistics:
    reference, others, spread, label = stats
    return Statistics(reference, others, spread, label, mean, mean2)


def _fits(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type == "cuda":
        return cuda_operators.hindrance(hidden, weight, dtypes=(torch.bfloat16,))
    if hidden.device.type != "cpu":
        return None if hidden.device.type == "meta" else f"no kernel for {hidden.device.type} yet"
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {hidden.dtype}"
    level = extension.isa()
    if level == "none" or not torch.backends.mkldnn.is_available():
        return "no AVX2"
    if hidden.dtype == torch.bfloat16 and (level not in ("avx512_bf16", "amx") or hidden.shape[1] % 2):
        return "bfloat16 needs AVX512-BF16 and an even hidden size"
    return None


choice.register(NAME, "loss of a linear head without its logits", _fits, on_cuda=True)


# ---- plain torch ---------------------------------------------------------------------------------------------------------------------


def chunk_rows(vocab: int) -> int:
    """Tokens whose logits are computed at a time in plain torch."""
    return max(16, _CHUNK_BYTES // (4 * max(1, vocab)))


def capped_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, limits: Limits) -> Tensor:
    """fp32 logits of some tokens, scaled and capped."""
    logits = (hidden.to(weight.dtype) @ weight.t()).float()
    if bias is not None:
        logits.add_(bias.float())
    if limits.scale != 1.0:
        logits.mul_(limits.scale)
    return logits if limits.cap == 0.0 else logits.div_(limits.cap).tanh_().mul_(limits.cap)


def _slope(logits: Tensor, cap: float) -> Tensor | None:
    return None if cap == 0.0 else 1.0 - (logits / cap).square_()


def _reference_statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, limits: Limits, gradient: int) -> Statistics:
    wide = widen(weight)[: limits.valid]
    bias = None if bias is None else bias[: limits.valid]
    here = (labels >= 0) & (labels < limits.valid)
    numbers = torch.empty(4, len(labels), dtype=torch.float32, device=hidden.device)
    mean, mean2 = (torch.zeros(len(labels) if gradient >= level else 0, hidden.shape[1], device=hidden.device) for level in (1, 2))
    if not limits.valid:
        numbers[0], numbers[1:3], numbers[3] = _LOWEST, 0.0, -torch.inf
        return _named(numbers, mean, mean2)
    step = chunk_rows(weight.shape[0])
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        logits = capped_logits(hidden[rows], wide, bias, limits)
        target = labels[rows].masked_fill(~here[rows], 0)[:, None]
        label = logits.gather(1, target).masked_fill_(~here[rows][:, None], -torch.inf)
        slope = _slope(logits, limits.cap) if gradient else None
        logits.scatter_(1, target, torch.where(here[rows][:, None], _LOWEST, logits.gather(1, target)))
        peak = logits.amax(-1, keepdim=True)
        distance = logits.sub_(peak)
        e = distance.exp().masked_fill_(peak == _LOWEST, 0.0)
        weighted = e * distance.clamp_(min=-1e4)
        numbers[:, rows] = torch.cat((peak, e.sum(-1, keepdim=True), weighted.sum(-1, keepdim=True), label), 1).t()
        for level, factor, into in ((1, e, mean), (2, weighted, mean2)):
            if gradient >= level:
                into[rows] = ((factor if slope is None else factor * slope).to(wide.dtype) @ wide).float()
    return _named(numbers, mean, mean2)


def _reference_weight_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    wide, short = widen(weight)[: limits.valid], None if bias is None else bias[: limits.valid]
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    grad_bias = torch.zeros(weight.shape[0] if bias is not None else 0, device=hidden.device)
    here = (labels >= 0) & (labels < limits.valid)
    step = chunk_rows(weight.shape[0])
    for start in range(0, len(labels) if limits.valid else 0, step):
        rows = slice(start, start + step)
        lse, a, b, g = (part[rows][:, None] for part in factors)
        logits = capped_logits(hidden[rows], wide, short, limits).clamp_(min=_LOWEST)  # of a bias of -inf: not 0 times infinity below
        slope = _slope(logits, limits.cap)
        gradient = (logits - lse).exp_().mul_(a - b * logits)
        gradient.scatter_add_(1, labels[rows].masked_fill(~here[rows], 0)[:, None], g * here[rows][:, None])
        if slope is not None:
            gradient.mul_(slope)
        gradient.mul_(limits.scale)
        if bias is not None:
            grad_bias[: limits.valid] += gradient.sum(0)
        grad_weight[: limits.valid] += gradient.to(wide.dtype).t() @ hidden[rows].to(wide.dtype)
    return grad_weight.to(weight.dtype), grad_bias


# ---- either --------------------------------------------------------------------------------------------------------------------------


def statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, limits: Limits, gradient: int) -> Statistics:
    """Of every token under the softmax over these rows of the weight.

    Args:
        hidden: ``[tokens, hidden size]``. weight: ``[rows, hidden size]``. bias: ``[rows]`` or None.
        labels: int64 ``[tokens]``, a row or -1. gradient: 0, 1 (with `mean`) or 2 (with `mean2` too).
    """
    if not choice.compiled(NAME, hidden, weight):
        return _reference_statistics(hidden, weight, bias, labels, limits, gradient)
    stats, mean, mean2 = torch.ops.mswift.linear_softmax(hidden, weight, bias, labels, *limits, gradient)
    return _named(stats, mean, mean2)


def weight_gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Gradients of weight (its dtype) and bias (fp32; empty without one) for the gradient p (a - b z) + g [row is the label] of a logit z.

    Args:
        factors: fp32 ``[4, tokens]``: log-sum-exp, a, b, g.
    """
    if not choice.compiled(NAME, hidden, weight):
        return _reference_weight_gradient(hidden, weight, bias, labels, factors, limits)
    return torch.ops.mswift.linear_softmax_grad_weight(hidden, weight, bias, labels, factors, *limits)


def keeps(hidden: Tensor, weight: Tensor, limits: Limits) -> bool:
    """Whether logits can be kept. A compiled graph computes them again: it would have to copy what it cannot prove to be its own memory."""
    return hidden.device.type == "cpu" and limits.cap == 0.0 and choice.compiled(NAME, hidden, weight) and not torch.compiler.is_compiling()


def keeping_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, limits: Limits, gradient: bool
) -> tuple[Statistics, Kept]:
    """`statistics` where `keeps` holds, with the logits of as many tokens as the memory of the weight's gradient holds."""
    stats, mean, *kept = torch.ops.mswift.linear_softmax_keeping(hidden, weight, bias, labels, limits.valid, limits.scale, gradient, _ROOM)
    return _named(stats, mean, mean[:0]), Kept(*kept)


def kept_weight_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, kept: Kept, limits: Limits
) -> tuple[Tensor, Tensor]:
    """`weight_gradient` without b, once: the gradient takes the place of the kept logits.

    Args:
        factors: fp32 ``[4, tokens]``: log-sum-exp, a, g, and the whole gradient of the label's logit.
    """
    room = kept.memory.data  # with a version of its own: autograd has saved the other one
    grad_bias = torch.ops.mswift.linear_softmax_grad_weight_kept(hidden, weight, bias, labels, factors, room, *kept[1:], limits.valid, limits.scale)
    return room, grad_bias


if extension.available():

    @torch.library.register_fake("mswift::linear_softmax_keeping")
    def _(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: int, scale: float, gradient: bool, room: int
    ) -> tuple[Tensor, ...]:
        tokens, width = hidden.shape
        stats, mean = (hidden.new_empty(*size, dtype=torch.float32) for size in ((4, tokens), (tokens if gradient else 0, width)))
        wanted, panel = (tokens + 63) // 64 * 64, 64 * weight.shape[0] * hidden.element_size()
        own = min(wanted, width // 64 * 64)
        count = min(wanted, own + (room // panel * 64 if panel else 0))
        kept, more = weight.new_empty(weight.shape), weight.new_empty(weight.shape[0], count - own)
        return stats, mean, kept, more, hidden.new_empty((valid + 511) // 512, count, dtype=torch.float32)

    @torch.library.register_fake("mswift::linear_softmax_grad_weight_kept")
    def _(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factors: Tensor,
        kept: Tensor,
        more: Tensor,
        references: Tensor,
        valid: int,
        scale: float,
    ) -> Tensor:
        return hidden.new_empty(0 if bias is None else weight.shape[0], dtype=torch.float32)

    @torch.library.register_fake("mswift::linear_softmax")
    def _(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: int, scale: float, cap: float, gradient: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, width = hidden.shape
        stats = hidden.new_empty(4, tokens, dtype=torch.float32)
        mean, mean2 = (hidden.new_empty(tokens if gradient >= level else 0, width, dtype=torch.float32) for level in (1, 2))
        return stats, mean, mean2

    @torch.library.register_fake("mswift::linear_softmax_grad_weight")
    def _(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, valid: int, scale: float, cap: float
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(weight), hidden.new_empty(0 if bias is None else weight.shape[0], dtype=torch.float32)
