"""A frozen linear layer with a low-rank adapter in one differentiable step.

The adapter is added into the base product (forward) and into the input gradient (backward), so that no activation-sized temporary is made for
it. Dropout is a function of (seed, row, column), csrc/common/dropout.h: the mask is drawn again in the backward pass and never stored.
Three steps do the work, compiled (`mswift::lora_linear` and its gradients) or in plain torch; here they become differentiable, and here are
the ranks of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.kernels import checks, choice, cuda_operators, extension, functions
from mswift.kernels.dropout import factor_of, kept, threshold_of
from mswift.runtime.precision import widen

NAME = "lora_linear"

_ONEDNN = torch.backends.mkldnn.is_available()  # asked once: it cannot be traced


class Dropout(NamedTuple):
    """A mask: the rate in 256ths, what names it, where its first row and column lie in the whole activation, and the width of that."""

    threshold: int
    seed: int
    row: int
    column: int
    width: int

    @classmethod
    def of(cls, p: float, seed: int, row: int, column: int, width: int) -> Dropout:
        """The mask of a rate `p`, which is rounded to a multiple of 1/256; the scale is that of the rate in use."""
        return cls(threshold_of(p), seed, row, column, width)

    @property
    def factor(self) -> float:
        """Of what is kept."""
        return factor_of(self.threshold)


_NONE = Dropout(0, 0, 0, 0, 0)


# ---- plain torch ---------------------------------------------------------------------------------------------------------------------


def _kept(rows: int, columns: int, mask: Dropout, device: torch.device) -> Tensor:
    """bool ``[rows, columns]``."""
    numbers = torch.arange(mask.row, mask.row + rows, device=device)
    return kept(torch.full_like(numbers, mask.seed), numbers, (mask.column, mask.column + columns), mask.width, mask.threshold)


def keep_mask(shape: tuple[int, int], columns: tuple[int, int], p: float, seed: int, like: Tensor, *, first_row: int = 0) -> Tensor:
    """The inverted-dropout factors (0 or 1/(1-p)) of columns [start, stop) of a ``shape`` activation; beyond its width they are 0.

    They are a function of seed, row (counted from `first_row`) and column: the parts of ranks are the same as of one that holds all.
    """
    mask = Dropout.of(p, seed, first_row, columns[0], shape[1])
    return _kept(shape[0], columns[1] - columns[0], mask, like.device).to(like.dtype).mul_(mask.factor)


def _dropped(x: Tensor, mask: Dropout) -> Tensor:
    """Zeros where elements are dropped; the factor of the rest is left to the sums."""
    return x * _kept(x.shape[0], x.shape[1], mask, x.device) if mask.threshold else x


def _only_own(low: Tensor, ids: Tensor | None, adapters: int) -> Tensor:
    """Zeros at the ranks of adapters that are not a token's."""
    if ids is None:
        return low
    owner = torch.arange(low.shape[1], device=low.device) // (low.shape[1] // adapters)
    return low * (ids[:, None] == owner)


class Adapted(NamedTuple):
    """The weights of a layer: see `lora_linear`; a ``[ranks of all adapters, in]``, b ``[out, ranks]``, factor fp32 ``[out]``, ids ``[tokens]``."""

    weight: Tensor
    a: Tensor
    b: Tensor
    factor: Tensor | None
    ids: Tensor | None
    adapters: int
    scale: float


def _reference_forward(x: Tensor, bias: Tensor | None, layer: Adapted, mask: Dropout) -> tuple[Tensor, Tensor, Tensor]:
    flat, weight, b, factor = widen(x), widen(layer.weight), widen(layer.b), layer.factor
    low = _only_own(torch.mm(_dropped(flat, mask), widen(layer.a).t()).mul_(layer.scale * mask.factor), layer.ids, layer.adapters)
    if factor is None:
        output = torch.mm(flat, weight.t()) if bias is None else torch.addmm(widen(bias), flat, weight.t())
        return output.addmm_(low, b.t()).to(x.dtype), low.to(x.dtype), x.new_empty(0, weight.shape[0])
    inner = torch.mm(flat, weight.t()).addmm_(low, b.t())
    output = inner * factor if bias is None else inner * factor + bias
    return output.to(x.dtype), low.to(x.dtype), inner.to(x.dtype)


def _reference_grad_input(grad: Tensor, layer: Adapted, mask: Dropout, wanted: bool) -> tuple[Tensor, Tensor]:
    wide = widen(grad)
    if layer.factor is not None:
        wide = (wide * layer.factor).to(wide.dtype)
    grad_low = _only_own(torch.mm(wide, widen(layer.b)).mul_(layer.scale), layer.ids, layer.adapters)
    if not wanted:
        return grad.new_empty(0, layer.weight.shape[1]), grad_low.to(grad.dtype)
    grad_x = torch.mm(wide, widen(layer.weight))
    if mask.threshold:
        grad_x.add_(_dropped(torch.mm(grad_low, widen(layer.a)), mask), alpha=mask.factor)
    else:
        grad_x.addmm_(grad_low, widen(layer.a))
    return grad_x.to(grad.dtype), grad_low.to(grad.dtype)


def _reference_grad_factors(
    grad: Tensor, x: Tensor, low: Tensor, grad_low: Tensor, factor: Tensor | None, inner: Tensor, mask: Dropout
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widen(grad)
    grad_a = torch.mm(widen(grad_low).t(), _dropped(widen(x), mask)).mul_(mask.factor).to(x.dtype)
    if factor is None:
        return grad_a, torch.mm(wide.t(), widen(low)).to(x.dtype), _factors(x, 0)
    grad_factor = (grad.float() * inner.float() if grad.dtype != torch.float64 else grad * inner).sum(0)
    return grad_a, (torch.mm(wide.t(), widen(low)) * factor[:, None]).to(x.dtype), grad_factor


def _factors(x: Tensor, count: int) -> Tensor:
    """Room for DoRA's factors: fp32, or fp64 for an fp64 activation."""
    return x.new_empty(count, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


# ---- either --------------------------------------------------------------------------------------------------------------------------


def _fits(x: Tensor, *weights: Tensor) -> str | None:
    """Of `x`, weight, a and b, or of `x` alone for its dropout."""
    if x.device.type == "cuda":
        return cuda_operators.hindrance(x, *weights, dtypes=(torch.bfloat16,))
    if x.device.type not in ("cpu", "meta"):
        return f"no kernel for {x.device.type} yet"
    if x.dtype not in (torch.float32, torch.bfloat16) or any(weight.dtype != x.dtype for weight in weights):
        return f"no kernel for {x.dtype}"
    if not (_ONEDNN and extension.isa_at_least("avx2")):
        return "no AVX2"
    if x.dtype == torch.bfloat16 and weights:
        even = all(size % 2 == 0 for size in (*weights[0].shape, weights[1].shape[0]))
        if not (even and extension.isa_at_least("avx512_bf16")):
            return "bfloat16 needs AVX512-BF16 and even sizes"
    return "no ranks" if weights and not len(weights[1]) else None


choice.register(NAME, "frozen linear layer with its adapter, dropout drawn again", _fits, on_cuda=True)


class _Setting(NamedTuple):
    adapters: int
    scale: float
    mask: Dropout
    group: dist.ProcessGroup | None
    split: bool  # the tokens are split over the group


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = x.new_empty(len(x) * group.size(), *x.shape[1:])
    dist.all_gather(list(whole.chunk(group.size())), x.contiguous(), group=group)
    return whole


def _sum_of_gradients(grad_x: Tensor, setting: _Setting) -> tuple[Tensor, Any]:
    """The sum over the group, or this rank's tokens of it, and a handle to wait for; under way while the factors' gradients are computed."""
    group = setting.group
    if group is None:
        return grad_x, None
    if not setting.split:
        return grad_x, dist.all_reduce(grad_x, group=group, async_op=True)
    own = grad_x.new_empty(len(grad_x) // group.size(), grad_x.shape[1])
    return own, dist.reduce_scatter(own, list(grad_x.chunk(group.size())), group=group, async_op=True)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    @functions.forward
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        factor: Tensor | None,
        ids: Tensor | None,
        setting: _Setting,
    ) -> Tensor:
        flat = x if not setting.split or setting.group is None else _gather(x, setting.group)
        layer = Adapted(weight, a, b, factor, ids, setting.adapters, setting.scale)
        if choice.compiled(NAME, flat, weight, a, b):
            output, low, inner = torch.ops.mswift.lora_linear(flat, weight, bias, *layer[1:], setting.mask)
        else:
            output, low, inner = _reference_forward(flat, bias, layer, setting.mask)
        ctx.save_for_backward(x, weight, a, b, factor, ids, low, inner if ctx.needs_input_grad[5] else None)
        ctx.setting, ctx.bias_dtype = setting, None if bias is None else bias.dtype
        return output

    @staticmethod
    @functions.backward(NAME)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, factor, ids, low, inner = ctx.saved_tensors
        setting: _Setting = ctx.setting
        layer, grad, mask = Adapted(weight, a, b, factor, ids, setting.adapters, setting.scale), grads[0].contiguous(), setting.mask
        compiled = choice.compiled(NAME, grad, weight, a, b)
        whole = x if not setting.split or setting.group is None else _gather(x, setting.group)
        if compiled:
            grad_x, grad_low = torch.ops.mswift.lora_linear_grad_input(grad, weight, *layer[1:], mask, ctx.needs_input_grad[0])
        else:
            grad_x, grad_low = _reference_grad_input(grad, layer, mask, ctx.needs_input_grad[0])
        grad_x, sent = _sum_of_gradients(grad_x, setting) if ctx.needs_input_grad[0] else (None, None)
        grad_a, grad_b, grad_factor = None, None, None
        if any(ctx.needs_input_grad[3:6]):
            inner = grad if inner is None else inner  # without it the factor's gradient is not wanted
            compute = torch.ops.mswift.lora_linear_grad_factors if compiled else _reference_grad_factors
            grad_a, grad_b, grad_factor = compute(grad, whole, low, grad_low, factor, inner, mask)
        grad_bias = widen(grad).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        if sent is not None:
            sent.wait()
        wanted = ctx.needs_input_grad
        return grad_x, None, grad_bias, grad_a if wanted[3] else None, grad_b if wanted[4] else None, grad_factor if wanted[5] else None, None, None


def stack_targets(pairs: Sequence[tuple[Tensor, Tensor] | None], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Adapters (A ``[r_i, in]``, B ``[size_i, r_i]``) of the parts of one fused layer (q, k and v; gate and up) as one adapter of it.

    `pairs` has None for a part that is not adapted. The As lie below each other and the Bs on a diagonal, so that the activation is read once.
    """
    known = [pair for pair in pairs if pair is not None]
    ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
    rows = []
    for i, (pair, size) in enumerate(zip(pairs, sizes, strict=True)):
        b = known[0][1].new_zeros(size, 0) if pair is None else pair[1]
        if b.shape != (size, ranks[i]):
            raise ValueError(f"pairs: got B {tuple(b.shape)} for part {i}, wanted [{size}, {ranks[i]}]")
        rows.append(torch.nn.functional.pad(b, (sum(ranks[:i]), sum(ranks[i + 1 :]))))
    return torch.cat([a for a, _ in known]), torch.cat(rows)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, factor: Tensor | None, several: tuple[int, ...]) -> None:
    """`several`: of lora_a the sizes in front of ``[rank, in]``."""
    dtype, front = x.dtype, len(several)
    if weight.dim() != 2:
        checks.expect("weight", weight, ("out", "in"))
    out, into = weight.shape
    checks.expect("x", x, (*x.shape[:-1], into))
    checks.expect("weight", weight, (out, into), dtype)
    checks.expect("lora_a", lora_a, (*several, *lora_a.shape[front : front + 1], into), dtype)
    checks.expect("lora_b", lora_b, (*several, out, lora_a.shape[-2]), dtype)
    if bias is not None:
        checks.expect("bias", bias, (out,), dtype)
    if factor is not None:
        checks.expect("factor", factor, (out,), dtype if factor.dtype == torch.float64 else torch.float32)


def _check_place(p: float, first_row: int, first_column: int) -> None:
    checks.rate("dropout_p", p)
    if first_row < 0 or first_column < 0:
        checks.at_least("first_row", first_row, 0)
        checks.at_least("first_column", first_column, 0)


def dropout_of(x: Tensor, p: float, seed: int, *, first_row: int = 0, first_column: int = 0, full_width: int | None = None) -> Tensor:
    """`x` ``[..., columns]`` after the dropout of `lora_linear`; differentiable, nothing is stored. See there for the arguments."""
    _check_place(p, first_row, first_column)
    if p == 0.0:
        return x
    width = first_column + x.shape[-1] if full_width is None else full_width
    return _Dropped.apply(x.reshape(-1, x.shape[-1]), Dropout.of(p, seed, first_row, first_column, width)).view(x.shape)


class _Dropped(torch.autograd.Function):
    @staticmethod
    @functions.forward
    def forward(ctx: Any, x: Tensor, mask: Dropout) -> Tensor:
        ctx.mask = mask
        if choice.compiled(NAME, x):
            return torch.ops.mswift.lora_dropout(x, mask)
        return _dropped(x, mask) * mask.factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Dropped.apply(grads[0], ctx.mask), None


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
    first_row: int = 0,
    first_column: int = 0,
    full_width: int | None = None,
    factor: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """``factor * (x @ weight.T + scale * (dropout(x) @ lora_a.T) @ lora_b.T) + bias``; `weight` is frozen and gets no gradient.

    Args:
        x: ``[..., in]``. weight: ``[out, in]``. bias: ``[out]`` or None. lora_a: ``[rank, in]``. lora_b: ``[out, rank]``; one dtype for all. For a
            fused layer whose parts have adapters of their own: those of `stack_targets`.
        scale: factor of the adapter. dropout_p: rate in [0, 1). seed: names the dropout mask.
        first_row, first_column, full_width: where `x` lies in the whole activation if only some of its rows or columns are here (row-parallel
            input); columns at or beyond the full width are zeros (padded heads).
        factor: fp32 ``[out]``, on each output before the bias (DoRA's magnitude over norm); differentiable.
        adapter_ids: int64 ``[...]``, which of several adapters, lora_a ``[adapters, rank, in]`` and lora_b ``[adapters, out, rank]``, each token
            has; -1: none. Other ids are refused on a CPU and have no adapter on a device, where looking at them would mean to wait.
        group: sum the gradient of `x` over these ranks, as a column-parallel layer needs it (each rank sees its part of the output).
        sequence_parallel: each rank of `group` has its part of the tokens (along the first dim); they are gathered here, and again in the backward
            pass instead of being kept. Ids are those of all tokens.

    Returns:
        ``[..., out]`` of the dtype of `x`. For a row-parallel layer this is a partial sum: the caller reduces it. The gradient of the factor
        that every rank holds whole (`lora_a` of a column-parallel layer, `lora_b` of a row-parallel one) is a partial sum as well; it is
        best reduced once a step, for all layers together.

    Raises:
        ValueError: arguments that do not fit together.
    """
    group = group if group is not None and group.size() > 1 else None
    shape = (x.shape[0] * (group.size() if group is not None and sequence_parallel else 1), *x.shape[1:-1])
    adapters = 1
    x, weight, bias, lora_a, lora_b = functions.in_autocast_dtype(x, weight, bias, lora_a, lora_b)
    _check(x, weight, bias, lora_a, lora_b, factor, () if adapter_ids is None else tuple(lora_a.shape[:1]))
    _check_place(dropout_p, first_row, first_column)
    if adapter_ids is not None:
        checks.expect("adapter_ids", adapter_ids, shape, torch.int64)
        adapters = len(lora_a)
        checks.within("adapter_ids", adapter_ids, -1, adapters - 1)
        lora_a, lora_b = lora_a.flatten(0, 1), lora_b.transpose(0, 1).flatten(1)
        adapter_ids = adapter_ids.reshape(-1)
    width = first_column + x.shape[-1] if full_width is None else full_width
    mask = Dropout.of(dropout_p, seed, first_row, first_column, width) if dropout_p > 0 else _NONE
    setting = _Setting(adapters, scale, mask, group, sequence_parallel and group is not None)
    output = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, lora_a, lora_b, factor, adapter_ids, setting)
    return torch.ops.aten._unsafe_view(output, (*shape, weight.shape[0]))  # no view to autograd: what writes into it pays for no base


@extension.when_loaded
def _describe() -> None:
    def forward(x: Tensor, weight: Tensor, _bias: Any, a: Tensor, _b: Any, factor: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, out = len(x), weight.shape[0]
        return x.new_empty(rows, out), x.new_empty(rows, a.shape[0]), x.new_empty(0 if factor is None else rows, out)

    def grad_input(grad: Tensor, weight: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        wanted = rest[-1]
        return grad.new_empty(len(grad) if wanted else 0, weight.shape[1]), grad.new_empty(len(grad), a.shape[0])

    def grad_factors(grad: Tensor, x: Tensor, low: Tensor, _grad_low: Any, factor: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, rank = grad.shape[1], low.shape[1]
        return x.new_empty(rank, x.shape[1]), x.new_empty(out, rank), x.new_empty(0 if factor is None else out, dtype=torch.float32)

    torch.library.register_fake("mswift::lora_linear", forward)
    torch.library.register_fake("mswift::lora_linear_grad_input", grad_input)
    torch.library.register_fake("mswift::lora_linear_grad_factors", grad_factors)
    torch.library.register_fake("mswift::lora_dropout", lambda x, _dropout: x.new_empty(x.shape))
