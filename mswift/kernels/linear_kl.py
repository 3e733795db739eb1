"""Divergence of a student's head from a teacher's, token by token, in chunks: neither's logits exist as a whole.

Forward KL(teacher || student), reverse KL(student || teacher) or the generalised Jensen-Shannon divergence between them (Agarwal et al. 2024,
"On-Policy Distillation of Language Models", equation 1), over the whole vocabulary or over the teacher's k likeliest tokens. Plain torch: the
products take most of the time. The teacher is not differentiated; the student's logits are computed again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mswift.runtime.precision import widen

Kind = Literal["forward", "reverse", "jsd"]

_CHUNK_BYTES = 16 * 2**20


class _Setting(NamedTuple):
    kind: Kind
    beta: float
    temperature: float
    top_k: int | None
    valid: int


def _divergence(student: Tensor, teacher: Tensor, setting: _Setting) -> Tensor:
    """Of rows of logits (fp32, the teacher's not differentiated) -> ``[rows]``."""
    if setting.top_k is not None:
        teacher, places = teacher.topk(setting.top_k, dim=-1)
        student = student.gather(-1, places)
    log_p, log_q = (student / setting.temperature).log_softmax(-1), (teacher / setting.temperature).log_softmax(-1)
    if setting.kind == "forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if setting.kind == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    mixture = torch.logaddexp(log_q + math.log(setting.beta), log_p + math.log1p(-setting.beta))
    return (setting.beta * log_q.exp() * (log_q - mixture) + (1 - setting.beta) * log_p.exp() * (log_p - mixture)).sum(-1)


def _logits(hidden: Tensor, weight: Tensor, valid: int) -> Tensor:
    wide = widen(weight[:valid])
    return (hidden.to(wide.dtype) @ wide.t()).float()


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher: Callable[[slice], Tensor], setting: _Setting) -> Tensor:
        step = max(16, _CHUNK_BYTES // (4 * setting.valid))
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
            logits = _logits(hidden[rows], weight, setting.valid).requires_grad_()
            with torch.enable_grad():
                losses = _divergence(logits, ctx.teacher(rows), setting)
            (gradient,) = torch.autograd.grad(losses, logits, grads[0][rows])
            gradient = gradient.to(wide.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (gradient @ wide).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight[: setting.valid] += gradient.t() @ hidden[rows].to(wide.dtype)
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
    valid = min(student_weight.shape[0], teacher_vocab, vocab_size or student_weight.shape[0])
    if top_k is not None and not 1 <= top_k <= valid:
        raise ValueError(f"top_k: got {top_k}, wanted 1 to {valid}")
    counted = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    hidden, flat = (
        tensor.reshape(-1, tensor.shape[-1]) if counted is None else tensor.reshape(-1, tensor.shape[-1]).index_select(0, counted)
        for tensor in (student_hidden, other.detach())
    )

    def teacher(rows: slice) -> Tensor:
        return flat[rows, :valid].float() if teacher_weight is None else _logits(flat[rows], teacher_weight.detach(), valid)

    values = _LinearKL.apply(hidden, student_weight, teacher, _Setting(kind, beta, temperature, top_k, valid))
    if counted is None:
        return values.reshape(shape)
    return torch.zeros(shape.numel(), dtype=torch.float32, device=values.device).index_put((counted,), values).reshape(shape)
