"""Divergences between two softmaxes, row by row, and their gradients, from blocks of logits that stay in the cache.

Forward KL(teacher || student), reverse KL(student || teacher) or the generalised Jensen-Shannon divergence between them (Agarwal et al. 2024,
"On-Policy Distillation of Language Models", equation 1). With p of the student, q of the teacher, z and y their logits, d and c as below, a row's
gradient with respect to z is p - q for forward, p (d - c) for reverse with d = z - y and c = sum of p d, and for jsd (1 - beta) p (d - c)
with d = log(p / m). What needs sums over the columns of all ranks is exchanged here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]

_TINY = 1e-38  # below it a probability is zero to all that follows


class Measure(NamedTuple):
    """Which divergence. beta: the teacher's share of the mixture m of jsd."""

    kind: Kind
    beta: float

    @property
    def share(self) -> float:
        """A factor of every gradient."""
        return 1.0 - self.beta if self.kind == "jsd" else 1.0


class Room(NamedTuple):
    """fp32 ``[rows, columns]`` each: logits of student and teacher, their probabilities, and d. All are written over."""

    student: Tensor
    teacher: Tensor
    p: Tensor
    q: Tensor
    distance: Tensor


class Outcome(NamedTuple):
    """fp32 ``[rows]`` each: the divergences, log-sum-exp of student and teacher, and the c that gradients need."""

    values: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    centre: Tensor


def gathered(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[ranks, ...]``"""
    if group is None:
        return part[None]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)


def summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over ranks, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def _normalise(room: Room, group: dist.ProcessGroup | None) -> Tensor:
    """Probabilities from the logits of all ranks; returns their log-sum-exps, ``[2, rows]``."""
    pairs = ((room.student, room.p), (room.teacher, room.q))
    if group is None:
        return torch.stack([_softmax(logits, out) for logits, out in pairs])
    mine = [z.logsumexp(-1) if z.shape[1] else z.new_full((len(z),), -torch.inf) for z, _ in pairs]
    lse = gathered(torch.stack(mine), group).logsumexp(0)
    probabilities(room, lse)
    return lse


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Into `out`; returns the log-sum-exp. Over 150,000 columns torch's own is up to 1e-5 off in its sum: what it misses is put right."""
    total = torch.softmax(logits, -1, out=out).sum(-1)
    out.div_(total[:, None])
    return logits.amax(-1) - out.amax(-1).log()


def probabilities(room: Room, lse: Tensor) -> None:
    """Of the logits in `room`, whose log-sum-exps over all columns, ``[2, rows]``, are known."""
    for logits, out, total in ((room.student, room.p, lse[0]), (room.teacher, room.q, lse[1])):
        torch.sub(logits, total[:, None], out=out).exp_()


def _log_ratio(part: Tensor, mixture: Tensor, out: Tensor) -> Tensor:
    return torch.div(part, mixture, out=out).clamp_(min=_TINY).log_()


def distances(room: Room, measure: Measure) -> None:
    """d, and for jsd the mixture in place of the teacher's logits. Where the factor of d is zero, d is finite whatever the logits are."""
    student, teacher, p, q, distance = room
    if measure.kind == "jsd":
        torch.mul(p, 1.0 - measure.beta, out=teacher).add_(q, alpha=measure.beta).clamp_(min=_TINY)
        _log_ratio(p, teacher, distance)
        return
    first, second, factor = (teacher, student, q) if measure.kind == "forward" else (student, teacher, p)
    torch.sub(first, second, out=distance)
    if student.numel() and (student.device.type != "cpu" or not bool((student.amin() + teacher.amin()).isfinite())):
        distance.masked_fill_(factor == 0.0, 0.0)  # not infinity times zero; a pass worth saving where all logits are finite


def compare(room: Room, measure: Measure, group: dist.ProcessGroup | None) -> Outcome:
    """Of the logits in `room`; leaves probabilities and distances there for `gradient`, and the student's logits. Collective."""
    lse = _normalise(room, group)
    distances(room, measure)
    _, spare, p, q, distance = room
    if measure.kind == "jsd":
        to_teacher = _log_ratio(q, spare, spare).mul_(q).sum(-1)
        to_student = torch.mul(p, distance, out=spare).sum(-1)
        to_teacher, to_student = summed(torch.stack((to_teacher, to_student)), group)
        return Outcome(measure.beta * to_teacher + (1.0 - measure.beta) * to_student, lse[0], lse[1], to_student)
    forward = measure.kind == "forward"
    total = summed(torch.mul(q if forward else p, distance, out=spare).sum(-1), group)
    shift = lse[0] - lse[1]
    return Outcome(total + shift if forward else total - shift, lse[0], lse[1], total)


def gradient(room: Room, measure: Measure, centre: Tensor) -> Tensor:
    """With respect to the student's logits, without the factor `share`; lies in place of p."""
    if measure.kind == "forward":
        return room.p.sub_(room.q)
    return room.p.mul_(room.distance.sub_(centre[:, None]))


def likeliest(teacher: Tensor, k: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Columns here that may be among the k largest of all ranks, ``[rows, at most k]``, and which of them are."""
    values, places = teacher.topk(min(k, teacher.shape[1]), dim=-1)
    if group is None:
        return places, torch.ones_like(places, dtype=torch.bool)
    padded = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)
    chosen = gathered(padded, group).permute(1, 0, 2).flatten(1).topk(k, dim=-1).indices - group.rank() * k
    own = torch.zeros(len(values), k, dtype=torch.bool, device=values.device)
    mine = (chosen >= 0) & (chosen < k)
    own[mine.nonzero()[:, 0], chosen[mine]] = True
    return places, own[:, : values.shape[1]]
