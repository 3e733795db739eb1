"""Divergence of a student's head from a teacher's, token by token, in chunks: neither's logits exist as a whole.

Forward KL(teacher || student), reverse KL(student || teacher) or the generalised Jensen-Shannon divergence between them (Agarwal et al. 2024,
"On-Policy Distillation of Language Models", equation 1), over the whole vocabulary or over the teacher's k likeliest tokens, also where ranks share
the vocabulary. Plain torch: the products take most of the time. The teacher is not differentiated; the student's logits are
computed again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.runtime.precision import widen

Kind = Literal["forward", "reverse", "jsd"]

_CHUNK_BYTES = 16 * 2**20


class _Setting(NamedTuple):
    kind: Kind
    beta: float
    temperature: float
    top_k: int | None
    valid: int  # rows of the heads here that are no padding
    group: dist.ProcessGroup | None
    reduce_grad: bool


def _gathered(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[ranks, ...]``"""
    if group is None:
        return part[None]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)


def _log_softmax(scores: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over the scores of all ranks."""
    scores_lse = scores.logsumexp(-1) if scores.shape[1] else scores.new_full((len(scores),), -torch.inf)
    return scores - _gathered(scores_lse, group).logsumexp(0)[:, None]


def _likeliest(teacher: Tensor, k: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Columns here that may be among the k largest of all ranks, ``[rows, at most k]``, and which of them are."""
    values, places = teacher.topk(min(k, teacher.shape[1]), dim=-1)
    if group is None:
        return places, torch.ones_like(places, dtype=torch.bool)
    padded = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)
    chosen = _gathered(padded, group).permute(1, 0, 2).flatten(1).topk(k, dim=-1).indices - group.rank() * k
    own = torch.zeros(len(values), k, dtype=torch.bool, device=values.device)
    mine = (chosen >= 0) & (chosen < k)
    own[mine.nonzero()[:, 0], chosen[mine]] = True
    return places, own[:, : values.shape[1]]


def _terms(log_p: Tensor, log_q: Tensor, setting: _Setting) -> Tensor:
    """What each token of the vocabulary adds to the divergence."""
    if setting.kind == "forward":
        return log_q.exp() * (log_q - log_p)
    if setting.kind == "reverse":
        return log_p.exp() * (log_p - log_q)
    mixture = torch.logaddexp(log_q + math.log(setting.beta), log_p + math.log1p(-setting.beta))
    return setting.beta * log_q.exp() * (log_q - mixture) + (1 - setting.beta) * log_p.exp() * (log_p - mixture)


def _distributions(student: Tensor, teacher: Tensor, setting: _Setting) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(log p, log q) of rows of logits (fp32) over the columns that count here, and with top_k the places of these and whether each counts."""
    places, own = None, None
    if setting.top_k is not None:
        places, own = _likeliest(teacher, setting.top_k, setting.group)
        student, teacher = (scores.gather(-1, places).masked_fill(~own, -torch.inf) for scores in (student, teacher))
    log_p, log_q = (_log_softmax(scores / setting.temperature, setting.group) for scores in (student, teacher))
    if own is not None:
        log_p, log_q = log_p.masked_fill(~own, 0.0), log_q.masked_fill(~own, 0.0)  # finite; their terms are left out
    return log_p, log_q, places, own


def _sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def _divergence(student: Tensor, teacher: Tensor, setting: _Setting) -> Tensor:
    """``[rows]``. Collective."""
    log_p, log_q, _, own = _distributions(student, teacher, setting)
    terms = _terms(log_p, log_q, setting)
    return _sum_over((terms if own is None else terms * own).sum(-1), setting.group)


def _gradient(student: Tensor, teacher: Tensor, upstream: Tensor, setting: _Setting) -> Tensor:
    """Of the student's logits here: with c the gradient of log p, c - p (sum of all c), over the temperature. Collective."""
    log_p, log_q, places, own = _distributions(student, teacher, setting)
    with torch.enable_grad():
        leaf = log_p.detach().requires_grad_()
        terms = _terms(leaf, log_q, setting)
    (pull,) = torch.autograd.grad(terms, leaf, upstream[:, None].expand_as(terms) if own is None else upstream[:, None] * own)
    probabilities = log_p.exp() if own is None else log_p.exp() * own
    gradient = (pull - probabilities * _sum_over(pull.sum(-1), setting.group)[:, None]) / setting.temperature
    return gradient if places is None else torch.zeros_like(student).scatter_(1, places, gradient)


def _logits(hidden: Tensor, weight: Tensor, valid: int) -> Tensor:
    wide = widen(weight[:valid])
    return (hidden.to(wide.dtype) @ wide.t()).float()


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher: Callable[[slice], Tensor], setting: _Setting) -> Tensor:
        step = max(16, _CHUNK_BYTES // (4 * len(weight)))  # the same on all ranks
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            losses[rows] = _divergence(_logits(hidden[rows], weight, setting.valid), teacher(rows), setting)
        ctx.save_for_backward(hidden, weight)
        ctx.teacher, ctx.setting, ctx.step = teacher, setting, step
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        setting: _Setting = ctx.setting
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        wide = widen(weight[: setting.valid])
        for start in range(0, len(hidden), ctx.step):
            rows = slice(start, start + ctx.step)
            logits = _logits(hidden[rows], weight, setting.valid)
            gradient = _gradient(logits, ctx.teacher(rows), grads[0][rows], setting).to(wide.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (gradient @ wide).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight[: setting.valid] += gradient.t() @ hidden[rows].to(wide.dtype)
        if grad_hidden is not None and setting.reduce_grad:
            _sum_over(grad_hidden, setting.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    mask: Tensor | None = None,
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_grad: bool = True,
) -> Tensor:
    """Divergence between what a student's head and a teacher say of each token; differentiable in the student.

    Args:
        student_hidden: ``[..., hidden]``. student_weight: ``[vocabulary, hidden]``.
        teacher_hidden, teacher_weight: the teacher's, of any hidden size; or teacher_logits: ``[..., vocabulary]``.
        mask: bool ``[...]``, tokens that count; the others cost nothing and are zero in the result.
        kind: ``forward`` KL(teacher || student), ``reverse`` KL(student || teacher), ``jsd``: beta KL(teacher || m) + (1 - beta) KL(student || m)
            with the mixture m = beta teacher + (1 - beta) student.
        temperature: divides both logits. top_k: compare only the teacher's k likeliest tokens, each distribution normalised over them.
        vocab_size: rows at or beyond it are padding; None: none of either (the smaller vocabulary decides).
        group: the ranks that share the vocabulary, each with an equal slice of both heads (or of the teacher's logits) in rank order; hidden states
            are the same on all. reduce_grad: sum the gradient of the hidden states over them; False leaves each its own part.

    Returns:
        fp32 ``[...]``.

    Raises:
        ValueError: arguments that do not fit together.
    """
    given = (teacher_hidden is not None and teacher_weight is not None, teacher_logits is not None)
    if sum(given) != 1:
        raise ValueError("teacher_logits: wanted either these, or teacher_hidden with teacher_weight")
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"kind: got {kind!r}, wanted forward, reverse or jsd")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta: got {beta}, wanted more than 0 and less than 1; forward and reverse are kinds of their own")
    if not temperature > 0.0:
        raise ValueError(f"temperature: got {temperature}, wanted more than 0")
    shape = student_hidden.shape[:-1]
    other = teacher_logits if teacher_logits is not None else teacher_hidden
    assert other is not None
    for name, tensor in (("teacher", other.shape[:-1]), ("mask", shape if mask is None else mask.shape)):
        if tensor != shape:
            raise ValueError(f"{name}: got tokens {tuple(tensor)}, wanted {tuple(shape)} as those of student_hidden")
    teacher_vocab = other.shape[-1] if teacher_weight is None else teacher_weight.shape[0]
    group = group if group is not None and group.size() > 1 else None
    if group is not None and teacher_vocab != student_weight.shape[0]:
        raise ValueError(f"teacher: got {teacher_vocab} rows of the vocabulary here, wanted {student_weight.shape[0]} as the student has")
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    whole = min(student_weight.shape[0] * ranks, teacher_vocab * ranks, vocab_size or student_weight.shape[0] * ranks)
    valid = max(0, min(student_weight.shape[0], whole - rank * student_weight.shape[0]))
    if top_k is not None and not 1 <= top_k <= whole:
        raise ValueError(f"top_k: got {top_k}, wanted 1 to {whole}")
    counted = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    hidden, flat = (
        tensor.reshape(-1, tensor.shape[-1]) if counted is None else tensor.reshape(-1, tensor.shape[-1]).index_select(0, counted)
        for tensor in (student_hidden, other.detach())
    )

    def teacher(rows: slice) -> Tensor:
        return flat[rows, :valid].float() if teacher_weight is None else _logits(flat[rows], teacher_weight.detach(), valid)

    values = _LinearKL.apply(hidden, student_weight, teacher, _Setting(kind, beta, temperature, top_k, valid, group, reduce_grad))
    if counted is None:
        return values.reshape(shape)
    return torch.zeros(shape.numel(), dtype=torch.float32, device=values.device).index_put((counted,), values).reshape(shape)
