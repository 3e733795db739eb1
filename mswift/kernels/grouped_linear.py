"""Linear layers of several groups of rows, each with a weight of its own: all experts of a mixture in one call, with or without adapters.

The compiled kernel (bf16) reads each weight as it lies and rounds each output once, the adapter in the same sums. It is for many groups with few
rows each, where packing a weight costs as much as multiplying with it; with many rows a group plain torch is as fast, and runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mswift.kernels import checks, choice, cuda_operators, extension, functions
from mswift.kernels.dropout import factor_of, kept, threshold_of
from mswift.runtime.precision import widen

NAME = "grouped_linear"
FEW = 96
"""Rows of a group up to which, on the average, the kernel wins."""


def _fits(x: Tensor, *weights: Tensor) -> str | None:
    if x.device.type == "cuda":
        return cuda_operators.hindrance(x, *weights, dtypes=(torch.bfloat16,))
    if x.device.type != "cpu":
        return f"no kernel for {x.device.type}"
    if x.dtype != torch.bfloat16 or any(weight.dtype != x.dtype for weight in weights):
        return "takes bfloat16"
    return None if extension.isa_at_least("avx512_bf16") else "needs avx512_bf16"


choice.register(NAME, "linear layers of all experts in one call, adapters in the same sums", _fits, on_cuda=True)


def _compiled(x: Tensor, groups: int, mask: Mask | None, *others: Tensor) -> bool:
    """On a CPU, plain torch is as fast where many rows share a weight; but it draws masks slowly."""
    return (mask is not None or x.device.type != "cpu" or len(x) <= FEW * groups) and choice.compiled(NAME, x, *others)


class Mask(NamedTuple):
    """One dropout mask for each group; rows count from the group's first. threshold 0: none."""

    seeds: Tensor
    threshold: int
    first_column: int
    full_width: int

    def of(self, group: int, rows: int, width: int) -> Tensor:
        numbers = torch.arange(rows, device=self.seeds.device)
        columns = (self.first_column, self.first_column + width)
        return kept(self.seeds[group].expand(rows), numbers, columns, self.full_width, self.threshold)


class Product(NamedTuple):
    """``alpha (x W^T + mask * (low up^T)) + bias`` of each group; with `columns` W and up as they are. Without `low` the mask is on x."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor] = ()
    up: Sequence[Tensor] = ()
    columns: bool = False
    alpha: float = 1.0

    def __call__(self, x: Tensor, counts: Tensor, low: Tensor | None, mask: Mask | None) -> Tensor:
        if not _compiled(x, len(self.weights), mask, *self.weights):
            return self.by_torch(x, counts, low, mask)
        seeds, *limits = mask or (None, 0, 0, 0)
        up = list(self.up) if low is not None else []
        given = (x, list(self.weights), counts, list(self.biases), low, up, self.columns, self.alpha)
        return torch.ops.mswift.grouped_product(*given, seeds, *limits)

    def by_torch(self, x: Tensor, counts: Tensor, low: Tensor | None, mask: Mask | None) -> Tensor:
        rows, wide_low = widen(x), None if low is None else widen(low)
        out = rows.new_empty(len(x), self.weights[0].shape[1 if self.columns else 0])
        for group, part in _parts(counts):
            to, of_group = out[part], rows[part]
            if mask is not None and wide_low is None:
                of_group = of_group * mask.of(group, *of_group.shape)
            torch.mm(of_group, self._right(self.weights[group]), out=to)
            if wide_low is not None and mask is None:
                to.addmm_(wide_low[part], self._right(self.up[group]))
            elif wide_low is not None and mask is not None:
                to.addcmul_(torch.mm(wide_low[part], self._right(self.up[group])), mask.of(group, *to.shape).to(to.dtype))
            if self.alpha != 1.0:
                to.mul_(self.alpha)
            if self.biases:
                to.add_(self.biases[group])
        return out.to(x.dtype)

    def _right(self, weight: Tensor) -> Tensor:
        return widen(weight) if self.columns else widen(weight).t()


def _parts(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """The rows of every group that has some."""
    first = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            yield group, slice(first, first + count)
        first += count


def outer(a: Tensor, b: Tensor, counts: Tensor, mask: Mask | None) -> Tensor:
    """``a^T (mask * b)`` of each group, ``[groups, columns of a, columns of b]``."""
    if _compiled(a, len(counts), mask, b):
        seeds, *limits = mask or (None, 0, 0, 0)
        return torch.ops.mswift.grouped_outer(a, b, counts, seeds, *limits)
    left, right = widen(a), widen(b)
    out = left.new_zeros(len(counts), a.shape[1], b.shape[1])
    for group, part in _parts(counts):
        factor = right[part] if mask is None else right[part] * mask.of(group, *right[part].shape)
        torch.mm(left[part].t(), factor, out=out[group])
    return out.to(a.dtype)


class _Settings(NamedTuple):
    groups: int
    biases: int
    adapters: int
    alpha: float
    mask: Mask | None


class _GroupedLinear(torch.autograd.Function):
    """Tensors: weights, biases, lora_a and lora_b of all groups one after another."""

    @staticmethod
    @functions.forward
    def forward(ctx: Any, x: Tensor, counts: Tensor, settings: _Settings, *tensors: Tensor) -> Tensor:
        weights, biases, lora_a, lora_b = _split(settings, tensors)
        low = None
        if lora_a:
            low = Product(lora_a, alpha=settings.alpha)(x, counts, None, settings.mask)
        ctx.settings = settings
        ctx.save_for_backward(x, counts, low, *tensors)
        return Product(weights, biases, lora_b)(x, counts, low, None)

    @staticmethod
    @functions.backward(NAME)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, counts, low, *tensors = ctx.saved_tensors
        settings: _Settings = ctx.settings
        weights, biases, lora_a, lora_b = _split(settings, tensors)
        grad = grads[0].contiguous()
        needed = _split(settings, ctx.needs_input_grad[3:])
        grad_low = grad_x = None
        if lora_a:
            grad_low = Product(lora_b, columns=True, alpha=settings.alpha)(grad, counts, None, None)
        if ctx.needs_input_grad[0]:
            grad_x = Product(weights, up=lora_a, columns=True)(grad, counts, grad_low, settings.mask if lora_a else None)
        groups: list[Tensor | None] = [None] * len(weights)
        of_weights = outer(grad, x, counts, None).unbind() if any(needed[0]) else groups
        of_biases = _sums(grad, counts, biases) if any(needed[1]) else [None] * len(biases)
        of_a = outer(grad_low, x, counts, settings.mask).unbind() if grad_low is not None and any(needed[2]) else [None] * len(lora_a)
        of_b = outer(grad, low, counts, None).unbind() if low is not None and any(needed[3]) else [None] * len(lora_b)
        return (grad_x, None, None, *of_weights, *of_biases, *of_a, *of_b)


def _split(settings: _Settings, tensors: Sequence[Any]) -> list[Sequence[Any]]:
    ends, parts = 0, []
    for count in (settings.groups, settings.biases, settings.adapters, settings.adapters):
        parts.append(tensors[ends : ends + count])
        ends += count
    return parts


def _sums(grad: Tensor, counts: Tensor, biases: Sequence[Tensor]) -> list[Tensor]:
    """Of the rows of each group, by a product: in one order everywhere, and no count has to be known to the host."""
    rows = grad.float() if grad.dtype == torch.bfloat16 else grad
    owner = torch.repeat_interleave(counts, output_size=len(grad))
    own = owner == torch.arange(len(counts), device=grad.device)[:, None]
    return [total.to(bias.dtype) for total, bias in zip(own.to(rows.dtype) @ rows, biases, strict=True)]


Matrices = Tensor | Sequence[Tensor]


def _list(tensors: Matrices | None) -> list[Tensor]:
    if tensors is None:
        return []
    return list(tensors.unbind() if isinstance(tensors, Tensor) else tensors)


def _check(x: Tensor, counts: Tensor, mask: Mask | None, lists: Sequence[Sequence[Tensor]]) -> None:
    """By the names of the faces."""
    weights, biases, lora_a, lora_b = lists
    groups = len(weights)
    if not groups or weights[0].dim() != 2:
        raise ValueError(f"weights: got {[list(weight.shape) for weight in weights[:1]]}, wanted [out, in] for each expert")
    out, into = weights[0].shape
    checks.expect("x", x, (*x.shape[:1], into))
    checks.expect_each("weights", weights, groups, (out, into), x.dtype)
    checks.expect("tokens_per_expert", counts, (groups,))
    if counts.dtype.is_floating_point:
        raise ValueError(f"tokens_per_expert: got {checks.short(counts.dtype)} {list(counts.shape)}, wanted whole numbers")
    checks.counts("tokens_per_expert", counts, len(x))
    if biases:
        checks.expect_each("biases", biases, groups, (out,))
    if lora_a or lora_b:
        rank = lora_a[0].shape[0] if lora_a and lora_a[0].dim() else 0
        checks.expect_each("lora_a", lora_a, groups, (rank, into), x.dtype)
        checks.expect_each("lora_b", lora_b, groups, (out, rank), x.dtype)
    if mask is not None:
        checks.expect("seeds", mask.seeds, (groups,), torch.int64)
        checks.at_least("first_column", mask.first_column, 0)


def _apply(x: Tensor, counts: Tensor, lists: list[list[Tensor]], alpha: float, mask: Mask | None) -> Tensor:
    lists = [list(functions.in_autocast_dtype(x, *part)[1:]) for part in lists]
    (x,) = functions.in_autocast_dtype(x)
    _check(x, counts, mask, lists)
    weights, biases, lora_a, _ = lists
    counts = counts.to(device=x.device, dtype=torch.int64)
    return _GroupedLinear.apply(
        x, counts, _Settings(len(weights), len(biases), len(lora_a), alpha, mask), *(tensor for part in lists for tensor in part)
    )


def grouped_linear(x: Tensor, weights: Matrices, tokens_per_expert: Tensor, biases: Matrices | None = None) -> Tensor:
    """``x @ weights[e].T + biases[e]`` for the rows of each expert e.

    Args:
        x: ``[rows, in]``, sorted by expert. weights: ``[experts, out, in]``, or a matrix for each expert, which need not lie side by side.
        tokens_per_expert: int64 ``[experts]``, may be 0. biases: ``[experts, out]``, or a vector for each expert.

    Returns:
        ``[rows, out]`` of the dtype of `x`. What a row becomes does not depend on the other rows if the kernel runs.

    Raises:
        ValueError, RuntimeError: shapes that do not fit, with the argument's name.
    """
    return _apply(x, tokens_per_expert, [_list(weights), _list(biases), [], []], 1.0, None)


def lora_grouped_linear(
    x: Tensor,
    weights: Matrices,
    tokens_per_expert: Tensor,
    biases: Matrices | None,
    lora_a: Matrices,
    lora_b: Matrices,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seeds: Tensor | None = None,
    first_column: int = 0,
    full_width: int | None = None,
) -> Tensor:
    """``x @ weights[e].T + biases[e] + scale * (dropout(x) @ lora_a[e].T) @ lora_b[e].T`` for the rows of each expert e.

    Args:
        x, weights, tokens_per_expert, biases: as for `grouped_linear`; weights that need no gradient get none.
        lora_a: ``[experts, rank, in]``. lora_b: ``[experts, out, rank]``. scale: factor of the adapters.
        dropout_p: rate in [0, 1). seeds: int64 ``[experts]``, the mask of each (`mswift.kernels.dropout`), whose rows are those of the expert.
        first_column, full_width: where `x` lies in the whole activation if only some of its columns are here (row-parallel input).
    """
    mask = None
    checks.rate("dropout_p", dropout_p)
    if dropout_p > 0:
        if seeds is None:
            raise ValueError("seeds: got none, wanted int64 [experts] with a dropout rate above 0")
        mask = Mask(seeds, threshold_of(dropout_p), first_column, x.shape[-1] if full_width is None else full_width)
    lists = [_list(weights), _list(biases), _list(lora_a), _list(lora_b)]
    return _apply(x, tokens_per_expert, lists, scale * (factor_of(mask.threshold) if mask else 1.0), mask)


@extension.when_loaded
def _describe() -> None:
    @torch.library.register_fake("mswift::grouped_product")
    def _(x: Tensor, weights: Sequence[Tensor], counts: Tensor, biases: Any, low: Any, up: Any, columns: bool, *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], weights[0].shape[1 if columns else 0])

    @torch.library.register_fake("mswift::grouped_outer")
    def _(a: Tensor, b: Tensor, counts: Tensor, *_: Any) -> Tensor:
        return a.new_empty(counts.shape[0], a.shape[1], b.shape[1])
