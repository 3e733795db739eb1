"""Divergence of a student's head from a teacher's, token by token, in chunks: neither's logits exist as a whole.

Over the whole vocabulary or over the teacher's k likeliest tokens, also where ranks share the vocabulary. Plain torch: the products take most of the
time, and what lies between them (`divergences`) is done on a few rows at a time, in the cache and in place. The hidden states' gradient is known up
to a factor after the forward sweep; for a trained head the logits are computed once more, a block of the vocabulary for all tokens at a time, so that
its gradient is one product and is rounded once. The teacher is not differentiated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.kernels import functions
from mswift.kernels.divergences import Kind, Measure, Room, compare, distances, gradient, likeliest, probabilities, summed
from mswift.kernels.linear_log_probs import IGNORE
from mswift.runtime.precision import widen

_CHUNK_BYTES = 24 * 2**20  # products of one side: enough rows to feed a matrix product
_ROOM_BYTES = 3 * 2**19  # fp32 of one side: few enough for the caches


class _Side(NamedTuple):
    """A head and what it is applied to, or logits (`weight` is None); only rows of the vocabulary that are no padding."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: float
    cap: float

    def products(self, rows: slice, columns: slice, room: Tensor) -> Tensor:
        """Of some tokens and columns, without bias, factor and limit; in `room` unless they are there already."""
        if self.weight is None:
            return self.hidden[rows, columns]
        part, weight = self.hidden[rows].to(self.weight.dtype), self.weight[columns]
        return torch.mm(part, weight.t(), out=room[: len(part) * len(weight)].view(len(part), len(weight)))

    def at_places(self, rows: slice, places: Tensor) -> Tensor:
        """The same at some columns of each token."""
        assert self.weight is not None
        part = self.hidden[rows].to(self.weight.dtype)
        return torch.bmm(_rows_at(self.weight, places), part[:, :, None]).squeeze(2)

    def logits(self, products: Tensor, bias: Tensor | None, temperature: float, out: Tensor) -> Tensor:
        """fp32, over the temperature."""
        out.copy_(products)
        if bias is not None:
            out.add_(bias)
        if self.cap:
            return out.mul_(self.scale / self.cap).tanh_().mul_(self.cap / temperature)
        return out if self.scale == temperature else out.mul_(self.scale / temperature)

    def bias_of(self, columns: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]


class _Setting(NamedTuple):
    measure: Measure
    temperature: float
    top_k: int | None
    valid: int  # rows of the heads here that are no padding
    limits: tuple[float, float, float, float]  # factor and limit (0: none) of the student's logits, then of the teacher's
    group: dist.ProcessGroup | None
    reduce_grad: bool


def _rows_at(weight: Tensor, places: Tensor) -> Tensor:
    return weight.index_select(0, places.reshape(-1)).view(*places.shape, weight.shape[1])


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _Sweep:
    """The two sides, and memory for a chunk of them that is used again and again."""

    def __init__(self, operands: tuple[Tensor | None, ...], setting: _Setting) -> None:
        hidden, weight, bias, other, other_weight, other_bias = operands
        assert hidden is not None
        assert weight is not None
        assert other is not None
        valid = setting.valid
        scale, cap, other_scale, other_cap = setting.limits
        self.setting, self.tokens, self.valid = setting, len(hidden), valid
        self.student = _Side(hidden, widen(weight[:valid]), None if bias is None else bias[:valid].float(), scale, cap)
        wide = None if other_weight is None else widen(other_weight[:valid])
        self.teacher = _Side(other, wide, None if other_bias is None else other_bias[:valid].float(), other_scale, other_cap)
        self.share = scale * setting.measure.share / setting.temperature
        self.whole = setting.group is not None or hidden.device.type != "cpu"  # few exchanges, few launches
        size = 2 * len(weight) * (4 if self.whole or setting.top_k is not None else 1)
        if setting.top_k is not None:
            size = max(size, 2 * setting.top_k * weight.shape[1])
        self.step = max(16, _CHUNK_BYTES // size)  # tokens of a chunk: the same on all ranks
        self.block = max(64, _CHUNK_BYTES // (2 * max(1, self.tokens)) // 64 * 64)  # columns of a block of all tokens

    def rooms(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """For the products of either side."""
        sides = [self.student.weight if side.weight is None else side.weight for side in (self.student, self.teacher)]
        student, teacher = (torch.empty(rows * columns, dtype=side.dtype, device=side.device) for side in sides if side is not None)
        return student, teacher

    def rows_of_a_room(self, rows: int, columns: int) -> int:
        return rows if self.whole else max(1, min(rows, max(2, _ROOM_BYTES // (4 * max(1, columns)))))

    def room(self, rows: int, columns: int) -> Tensor:
        return torch.empty(5, rows, columns, device=self.student.hidden.device)

    def slope(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the products from that of the logits; `logits` (over the temperature) is written over."""
        cap = self.student.cap
        return gradient if not cap else gradient.mul_(logits.mul_(self.setting.temperature / cap).square_().neg_().add_(1.0))

    def full(self, to_hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values, and fp32 ``[3, tokens]``: log-sum-exps and what the gradient needs; `to_hidden` becomes the gradient of the sum of values."""
        everything, setting, weight = slice(0, self.valid), self.setting, self.student.weight
        found = torch.empty(4, self.tokens, device=self.student.hidden.device)
        chunk = max(1, min(self.step, self.tokens))
        at_once = self.rows_of_a_room(chunk, self.valid)
        rooms, room = self.rooms(chunk, self.valid), self.room(at_once, self.valid)
        for rows in _slices(self.tokens, chunk):
            products = [side.products(rows, everything, into) for side, into in zip((self.student, self.teacher), rooms)]
            for part in _slices(rows.stop - rows.start, at_once):
                here = Room(*room[:, : part.stop - part.start])
                for side, of, out in ((self.student, products[0], here.student), (self.teacher, products[1], here.teacher)):
                    side.logits(of[part], side.bias, setting.temperature, out)
                outcome = compare(here, setting.measure, setting.group)
                found[:, rows.start + part.start : rows.start + part.stop] = torch.stack(outcome)
                if to_hidden is not None:
                    products[0][part] = self.slope(gradient(here, setting.measure, outcome.centre), here.student).mul_(self.share)
            if to_hidden is not None:
                assert weight is not None
                to_hidden[rows] = products[0] @ weight
        return found[0], found[1:]

    def likeliest(self, to_hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Values, and of all columns that count their places and the gradients of the sum of values at them, ``[tokens, at most k]``."""
        setting, student, weight = self.setting, self.student, self.student.weight
        assert setting.top_k is not None
        assert weight is not None
        count, everything = min(setting.top_k, self.valid), slice(0, self.valid)
        values = torch.empty(self.tokens, device=student.hidden.device)
        places = torch.empty(self.tokens, count, dtype=torch.int64, device=values.device)
        gradients = torch.empty(self.tokens, count, device=values.device)
        room = self.rooms(min(self.step, self.tokens), self.valid)[1]
        for rows in _slices(self.tokens, self.step):
            products = self.teacher.products(rows, everything, room)
            teacher = self.teacher.logits(products, self.teacher.bias, setting.temperature, torch.empty_like(products, dtype=torch.float32))
            at, own = likeliest(teacher, setting.top_k, setting.group)
            here = Room(*self.room(*at.shape))
            student.logits(student.at_places(rows, at), None if student.bias is None else student.bias[at], setting.temperature, here.student)
            slopes = self.slope(torch.ones_like(here.student), here.student.clone())
            here.student.masked_fill_(~own, -torch.inf)
            here.teacher.copy_(teacher.gather(-1, at)).masked_fill_(~own, -torch.inf)
            outcome = compare(here, setting.measure, setting.group)
            values[rows], places[rows] = outcome.values, at
            gradients[rows] = gradient(here, setting.measure, outcome.centre).mul_(slopes).mul_(self.share)
            if to_hidden is not None:
                to_hidden[rows] = torch.bmm(gradients[rows].to(weight.dtype)[:, None], _rows_at(weight, at)).squeeze(1)
        return values, places, gradients

    def again(self, columns: slice, rooms: tuple[Tensor, Tensor], known: Tensor, upstream: Tensor, grad_bias: Tensor | None) -> Tensor:
        """The gradient of a block of the student's products, for all tokens, from what `full` found."""
        sides, measure = (self.student, self.teacher), self.setting.measure
        products = [side.products(slice(0, self.tokens), columns, into) for side, into in zip(sides, rooms)]
        width = columns.stop - columns.start
        at_once = self.rows_of_a_room(self.tokens, width)
        room = self.room(at_once, width)
        for part in _slices(self.tokens, at_once):
            here = Room(*room[:, : part.stop - part.start])
            for side, of, out in zip(sides, products, (here.student, here.teacher)):
                side.logits(of[part], side.bias_of(columns), self.setting.temperature, out)
            probabilities(here, known[:2, part])
            if measure.kind != "forward":
                distances(here, measure)
            found = self.slope(gradient(here, measure, known[2, part]), here.student).mul_(upstream[part, None])
            if grad_bias is not None:
                grad_bias[columns] += found.sum(0)
            products[0][part] = found
        return products[0]

    def scattered(self, columns: slice, places: Tensor, gradients: Tensor, grad_bias: Tensor | None) -> Tensor:
        """The same from what `likeliest` found."""
        width = columns.stop - columns.start
        inside = (places >= columns.start) & (places < columns.stop)
        block = gradients.new_zeros(self.tokens, width + 1).scatter_(1, (places - columns.start).masked_fill_(~inside, width), gradients)[:, :width]
        if grad_bias is not None:
            grad_bias[columns] = block.sum(0)
        assert self.student.weight is not None
        return block.to(self.student.weight.dtype)

    def weight_gradient(self, weight: Tensor, known: tuple[Tensor, ...], upstream: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Of the student's head and its bias; `known`: what `full` or `likeliest` found."""
        grad_weight = torch.zeros_like(weight)
        grad_bias = torch.zeros(len(weight), device=weight.device) if bias else None
        if not self.tokens or not self.valid:
            return grad_weight, grad_bias
        wide = self.student.weight
        assert wide is not None
        hidden = self.student.hidden.to(wide.dtype)
        rooms = self.rooms(self.tokens, min(self.block, self.valid)) if len(known) == 1 else None
        upstream = upstream * self.share
        for columns in _slices(self.valid, self.block):
            if rooms is not None:
                block = self.again(columns, rooms, known[0], upstream, grad_bias)
            else:
                block = self.scattered(columns, known[0], known[1], grad_bias)
            grad_weight[columns] = block.t() @ hidden
        return grad_weight, grad_bias


class _LinearKL(torch.autograd.Function):
    @staticmethod
    @functions.forward
    def forward(ctx: Any, setting: _Setting, *operands: Tensor | None) -> Tensor:
        hidden = operands[0]
        assert hidden is not None
        ctx.setting, ctx.trained = setting, ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[1] else None
        sweep = _Sweep(operands, setting)
        values, *known = sweep.full(to_hidden) if setting.top_k is None else sweep.likeliest(to_hidden)
        ctx.save_for_backward(to_hidden, *(operands if ctx.trained else ()), *(known if ctx.trained else ()))
        return values

    @staticmethod
    @functions.backward("linear_kl")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, *rest = ctx.saved_tensors
        setting: _Setting = ctx.setting
        grad_hidden, grad_weight, grad_bias = None, None, None
        if to_hidden is not None:
            grad_hidden = (to_hidden.float() * grads[0][:, None]).to(to_hidden.dtype)
            if setting.reduce_grad:
                summed(grad_hidden, setting.group)
        if ctx.trained:
            operands, known = rest[:6], tuple(rest[6:])
            if setting.top_k is not None:
                known = (known[0], known[1] * grads[0][:, None])
            grad_weight, grad_bias = _Sweep(tuple(operands), setting).weight_gradient(operands[1], known, grads[0], operands[2] is not None)
            grad_bias = grad_bias.to(operands[2].dtype) if grad_bias is not None and ctx.needs_input_grad[3] else None
        return None, grad_hidden, grad_weight if ctx.needs_input_grad[2] else None, grad_bias, None, None, None


@torch.compiler.disable
def _run(setting: _Setting, *operands: Tensor | None) -> Tensor:
    return _LinearKL.apply(setting, *operands)


def _check_side(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> None:
    """Of one side's head; `name` with its underline is in front of the names of its arguments."""
    if not hidden.is_floating_point() or not hidden.dim():
        raise ValueError(f"{name}hidden: got {hidden.dtype} {tuple(hidden.shape)}, wanted floating-point [..., hidden]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.is_floating_point():
        raise ValueError(f"{name}weight: got {weight.dtype} {tuple(weight.shape)}, wanted floating-point [vocabulary, {hidden.shape[-1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}bias: got {tuple(bias.shape)}, wanted [{weight.shape[0]}]")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"{name}softcap: got {softcap}, wanted a positive number or None")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{name}logit_scale: got {scale}, wanted a positive number")


def _check_measure(kind: str, beta: float, temperature: float) -> None:
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"kind: got {kind!r}, wanted forward, reverse or jsd")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta: got {beta}, wanted more than 0 and less than 1; forward and reverse are kinds of their own")
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, wanted more than 0")


def _counted(shape: torch.Size, mask: Tensor | None, labels: Tensor | None, ignore_index: int, token_weights: Tensor | None) -> Tensor | None:
    """Which of the flat tokens count; None: all."""
    if mask is None and labels is None and token_weights is None:
        return None
    for name, tensor, dtype in (("mask", mask, torch.bool), ("labels", labels, torch.int64), ("token_weights", token_weights, None)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: got tokens {tuple(tensor.shape)}, wanted {tuple(shape)} as those of student_hidden")
        if tensor is not None and dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, wanted {dtype}")
    parts = [mask, None if labels is None else labels != ignore_index, None if token_weights is None else token_weights != 0]
    return torch.stack([part.reshape(-1) for part in parts if part is not None]).all(0).nonzero().squeeze(1)


def _vocabulary(rows: int, teacher_rows: int, vocab_size: int | None, top_k: int | None, group: dist.ProcessGroup | None) -> int:
    """Rows here that are no padding."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if ranks > 1 and teacher_rows != rows:
        raise ValueError(f"teacher: got {teacher_rows} rows of the vocabulary here, wanted {rows} as the student has")
    smaller = min(rows, teacher_rows) * ranks
    whole = smaller if vocab_size is None else vocab_size
    if not 1 <= whole <= smaller:
        raise ValueError(f"vocab_size: got {whole}, wanted 1 to {smaller}, what both sides have")
    if top_k is not None and not 1 <= top_k <= whole:
        raise ValueError(f"top_k: got {top_k}, wanted 1 to {whole}")
    return max(0, min(rows, whole - rank * rows))


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = IGNORE,
    token_weights: Tensor | None = None,
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
    reduce_grad: bool = True,
) -> Tensor:
    """Divergence between what a student's head and a teacher say of each token; differentiable in the student.

    Args:
        student_hidden: ``[..., hidden]``. student_weight: ``[vocabulary, hidden]``. student_bias: ``[vocabulary]``.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's, of any hidden size; or teacher_logits: ``[..., vocabulary]``, as they are.
        mask: bool ``[...]``, tokens that count; the others cost nothing and are zero in the result. labels: int64 ``[...]``; tokens with
            `ignore_index` do not count. token_weights: ``[...]``, a factor on each token's value, not differentiated; zero costs nothing.
        kind: ``forward`` KL(teacher || student), ``reverse`` KL(student || teacher), ``jsd``: beta KL(teacher || m) + (1 - beta) KL(student || m)
            with the mixture m = beta teacher + (1 - beta) student.
        temperature: divides both logits. top_k: compare only the teacher's k likeliest tokens, each distribution normalised over them; meant for
            some hundreds: the student's rows are gathered for each token.
        vocab_size: rows at or beyond it are padding; None: none of either (the smaller vocabulary decides).
        student_logit_scale, teacher_logit_scale: factors on the logits. student_softcap, teacher_softcap: after it, their limit:
            ``softcap * tanh(logits / softcap)``.
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
    other = teacher_logits if teacher_logits is not None else teacher_hidden
    assert other is not None
    _check_measure(kind, beta, temperature)
    _check_side("student_", student_hidden, student_weight, student_bias, student_softcap, student_logit_scale)
    if teacher_weight is not None:
        _check_side("teacher_", other, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    elif not other.is_floating_point():
        raise ValueError(f"teacher_logits: got {other.dtype}, wanted a floating-point type")
    elif teacher_bias is not None or teacher_softcap is not None or teacher_logit_scale != 1.0:
        raise ValueError("teacher_bias, teacher_softcap, teacher_logit_scale: wanted none of these with teacher_logits, which hold them already")
    shape = student_hidden.shape[:-1]
    if other.shape[:-1] != shape:
        raise ValueError(f"teacher: got tokens {tuple(other.shape[:-1])}, wanted {tuple(shape)} as those of student_hidden")
    group = group if group is not None and group.size() > 1 else None
    counted = _counted(shape, mask, labels, ignore_index, token_weights)
    teacher_rows = other.shape[-1] if teacher_weight is None else teacher_weight.shape[0]
    valid = _vocabulary(student_weight.shape[0], teacher_rows, vocab_size, top_k, group)
    limits = (student_logit_scale, student_softcap or 0.0, teacher_logit_scale, teacher_softcap or 0.0)
    setting = _Setting(Measure(kind, beta), temperature, top_k, valid, limits, group, reduce_grad)
    hidden, flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (student_hidden, other.detach()))
    if counted is not None:
        hidden, flat = hidden.index_select(0, counted), flat.index_select(0, counted)
    student = functions.in_autocast_dtype(hidden, student_weight, student_bias)
    teacher = (flat, None, None) if teacher_weight is None else functions.in_autocast_dtype(flat, teacher_weight.detach(), teacher_bias)
    values = _run(setting, *student, *teacher)
    if token_weights is not None:
        values = values * token_weights.detach().reshape(-1)[counted].float()
    if counted is None:
        return values.reshape(shape)
    return torch.zeros(shape.numel(), dtype=torch.float32, device=values.device).index_put((counted,), values).reshape(shape)
