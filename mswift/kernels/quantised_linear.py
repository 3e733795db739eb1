"""QLoRA: a linear layer whose frozen weight is kept in 4 or 8 bits, with an adapter beside it (https://arxiv.org/abs/2305.14314).

The weight is dequantised strip by strip inside the product, forward and for the gradient of the input; it never exists as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mswift.kernels import checks, choice, cuda_operators, extension, functions
from mswift.kernels.dropout import factor_of, threshold_of
from mswift.kernels.grouped_linear import Mask, Product, outer
from mswift.runtime.precision import widen

NAME = "quantised_linear"
STRIP = 128
"""Rows of the weight that plain torch dequantises at a time."""
_BLOCKS_AT_ONCE = 2**14
"""Blocks that are quantised at a time."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
    ),
    1.0,
)
"""The quantiles of a normal distribution between -1 and 1."""


@dataclass(frozen=True)
class Nested:
    """Magnitudes that are codes themselves (double quantisation): ``table[codes] * scales of their block + offset``."""

    codes: Tensor
    table: Tensor
    scales: Tensor
    block: int
    offset: float

    def values(self) -> Tensor:
        spread = self.scales.repeat_interleave(self.block)[: self.codes.numel()]
        return self.table[self.codes.long()] * spread + self.offset


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight ``[rows, columns]`` in codes, laid out as bitsandbytes does.

    Args:
        codes: nf4: uint8, two codes a byte, the first in the high half, the rows one after the other; int8: ``[rows, columns]``.
        scales: fp32; nf4: the largest magnitude of each block of the flattened weight, or what gives them; int8: the factor of each row.
        block: elements of a block of nf4; 0: int8.
    """

    codes: Tensor
    scales: Tensor | Nested
    shape: tuple[int, int]
    block: int

    def __post_init__(self) -> None:
        rows, columns = self.shape
        kind, count = (torch.uint8, rows * columns // 2) if self.block else (torch.int8, rows * columns)
        if self.codes.dtype != kind or self.codes.numel() != count:
            found = f"{checks.short(self.codes.dtype)} {list(self.codes.shape)}"
            raise ValueError(f"codes: got {found}, wanted {checks.short(kind)} for {rows} x {columns}, {count} in all")
        scales = self.scales.codes if isinstance(self.scales, Nested) else self.scales
        if scales.numel() != (-(-rows * columns // self.block) if self.block else rows):
            wanted = f"one a block of {self.block}" if self.block else "one a row"
            raise ValueError(f"scales: got {scales.numel()}, wanted {wanted} of {rows} x {columns}")

    @property
    def nbytes(self) -> int:
        """What it takes in memory, without the table of magnitudes, which all weights share."""
        scales = self.scales
        parts = [scales.codes, scales.scales] if isinstance(scales, Nested) else [scales]
        return sum(part.nbytes for part in (self.codes, *parts))

    @property
    def magnitudes(self) -> Tensor:
        return self.scales.values() if isinstance(self.scales, Nested) else self.scales

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """These rows, dequantised: computed in fp32, rounded once."""
        columns, magnitudes = self.shape[1], self.magnitudes
        if not self.block:
            return (self.codes.view(self.shape)[first:last].float() * magnitudes[first:last, None]).to(dtype)
        places = torch.arange(first * columns, last * columns, device=self.codes.device)
        codes = self.codes.flatten()[places // 2] >> (4 * (1 - places % 2)) & 15
        values = torch.tensor(NF4, device=codes.device)[codes.long()] * magnitudes[places // self.block]
        return values.view(-1, columns).to(dtype)


def quantise_nf4(weight: Tensor, block: int = 64) -> QuantisedWeight:
    """The nearest of the sixteen values for each element, over the largest magnitude of its block; an even number of elements."""
    parts = [_nf4(part, block) for part in weight.detach().reshape(-1).split(block * _BLOCKS_AT_ONCE)]
    codes, scales = (torch.cat(of_parts) for of_parts in zip(*parts))
    return QuantisedWeight(codes, scales, (weight.shape[0], weight.shape[1]), block)


def _nf4(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(flat.float(), (0, -flat.numel() % block)).view(-1, block)
    scales = padded.abs().amax(1)
    codes = _nearest(padded / scales.clamp(min=1e-30)[:, None], torch.tensor(NF4, device=flat.device)).flatten()[: flat.numel()]
    return codes[0::2] << 4 | codes[1::2], scales


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The places, uint8, of what comes nearest in a table that rises."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


def nested(scales: Tensor, block: int = 256) -> Nested:
    """Magnitudes as codes of 8 bits, as bitsandbytes' double quantisation makes them: their distance from the mean, over the largest of a block."""
    offset, table = float(scales.mean()), _dynamic_table().to(scales.device)
    padded = torch.nn.functional.pad(scales - offset, (0, -scales.numel() % block)).view(-1, block)
    spread = padded.abs().amax(1)
    codes = _nearest(padded / spread.clamp(min=1e-30)[:, None], table).flatten()[: scales.numel()]
    return Nested(codes, table, spread, block, offset)


@functools.cache
def _dynamic_table() -> Tensor:
    """256 values in [-1, 1] by which bitsandbytes stores magnitudes: seven decades, each with twice as many steps as the one below."""
    edges = [(torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64), 10.0 ** (decade - 6)) for decade in range(7)]
    steps = torch.cat([(edge[:-1] + edge[1:]) / 2 * size for edge, size in edges])
    return torch.cat([steps, -steps, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values.float()


def quantise_int8(weight: Tensor, largest: Tensor | None = None) -> QuantisedWeight:
    """Each row over its largest magnitude / 127; ``[rows, columns]``.

    Args:
        largest: fp32, the largest magnitude of each row of the whole weight, where this is a part of its columns.
    """
    largest = largest_of_rows(weight) if largest is None else largest
    codes = [
        (part.float() / magnitudes.clamp(min=1e-30)[:, None] * 127).round().to(torch.int8)
        for part, magnitudes in zip(weight.detach().split(STRIP), largest.split(STRIP))
    ]
    return QuantisedWeight(torch.cat(codes), largest / 127, (weight.shape[0], weight.shape[1]), 0)


def largest_of_rows(weight: Tensor) -> Tensor:
    """fp32 ``[rows]``."""
    return weight.detach().abs().amax(1).float()


def _fits(x: Tensor, codes: Tensor) -> str | None:
    if x.device.type == "cuda":
        return cuda_operators.hindrance(x, dtypes=(torch.bfloat16,))
    if x.device.type != "cpu":
        return f"no kernel for {x.device.type}"
    if x.dtype != torch.bfloat16:
        return "takes bfloat16"
    return None if extension.isa_at_least("avx512_bf16") else "needs avx512_bf16"


choice.register(NAME, "products with nf4 and int8 weights, dequantised on the way", _fits, on_cuda=True)


def _strips(weight: QuantisedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, weight.shape[0], STRIP):
        last = min(first + STRIP, weight.shape[0])
        yield slice(first, last), widen(weight.rows(first, last, dtype))


def _compiled(x: Tensor, weight: QuantisedWeight) -> bool:
    return weight.shape[1] % 16 == 0 and weight.block % 16 == 0 and choice.compiled(NAME, x, weight.codes)


def _forward(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, low: Tensor | None, up: Tensor | None) -> Tensor:
    if _compiled(x, weight):
        return torch.ops.mswift.quantised_product(x, weight.codes, weight.magnitudes, *weight.shape, weight.block, bias, low, up, False, [0] * 5)
    rows = widen(x)
    out = rows.new_empty(len(x), weight.shape[0])
    for strip, part in _strips(weight, x.dtype):
        out[:, strip] = rows @ part.t()
    if low is not None and up is not None:
        out.addmm_(widen(low), widen(up).t())
    return (out if bias is None else out + bias).to(x.dtype)


def _backward(grad: Tensor, weight: QuantisedWeight, low: Tensor | None, up: Tensor | None, mask: Mask | None) -> Tensor:
    if _compiled(grad, weight):
        dropout = [0] * 5 if mask is None else [mask.threshold, int(mask.seeds), 0, mask.first_column, mask.full_width]
        return torch.ops.mswift.quantised_product(grad, weight.codes, weight.magnitudes, *weight.shape, weight.block, None, low, up, True, dropout)
    sums = torch.zeros(len(grad), weight.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
    for strip, part in _strips(weight, grad.dtype):
        sums += widen(grad[:, strip]) @ part
    if low is not None and up is not None:
        added = (widen(low) @ widen(up)).to(sums.dtype)
        sums += added if mask is None else added * mask.of(0, *added.shape)
    return sums.to(grad.dtype)


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    @functions.forward
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QuantisedWeight,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scale: float,
        mask: Mask | None,
    ) -> Tensor:
        ctx.all_rows = torch.tensor([len(x)], device=x.device)
        low = None if lora_a is None else Product([lora_a], alpha=scale)(x, ctx.all_rows, None, mask)
        ctx.weight, ctx.scale, ctx.mask = weight, scale, mask
        ctx.save_for_backward(x, lora_a, lora_b, low)
        return _forward(x, weight, bias, low, lora_b)

    @staticmethod
    @functions.backward(NAME)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, low = ctx.saved_tensors
        grad, grad_low, grad_a, grad_b = grads[0].contiguous(), None, None, None
        if lora_a is not None:
            grad_low = Product([lora_b], columns=True, alpha=ctx.scale)(grad, ctx.all_rows, None, None)
            grad_a = outer(grad_low, x, ctx.all_rows, ctx.mask)[0]
            grad_b = outer(grad, low, ctx.all_rows, None)[0]
        grad_x = _backward(grad, ctx.weight, grad_low, lora_a, ctx.mask) if ctx.needs_input_grad[0] else None
        grad_bias = widen(grad).sum(0).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_a, grad_b, None, None


def _check(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None) -> None:
    rows, columns = weight.shape
    checks.expect("x", x, (*x.shape[:-1], columns))
    if bias is not None:
        checks.expect("bias", bias, (rows,), x.dtype)
    if lora_a is not None and lora_b is not None:
        checks.expect("lora_a", lora_a, (*lora_a.shape[:1], columns), x.dtype)
        checks.expect("lora_b", lora_b, (rows, len(lora_a)), x.dtype)


def quantised_linear(
    x: Tensor,
    weight: QuantisedWeight,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int = 0,
    first_column: int = 0,
    full_width: int | None = None,
) -> Tensor:
    """``x @ W.T + bias + scale * (dropout(x) @ lora_a.T) @ lora_b.T``, W being `weight` dequantised to the dtype of `x`.

    Args:
        x: ``[..., columns]``. bias: ``[rows]``. lora_a: ``[rank, columns]``. lora_b: ``[rows, rank]``; all of the dtype of `x`.
        dropout_p, seed: rate and name of the adapter's mask. first_column, full_width: where `x` lies in the whole activation.

    Returns:
        ``[..., rows]``.

    Raises:
        ValueError, RuntimeError: shapes that do not fit, with the argument's name.
    """
    checks.rate("dropout_p", dropout_p)
    checks.at_least("first_column", first_column, 0)
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_b: wanted together with lora_a")
    rows, *others = functions.in_autocast_dtype(x, bias, lora_a, lora_b)
    _check(rows, weight, *others)
    mask = None
    if dropout_p > 0:
        width = x.shape[-1] if full_width is None else full_width
        mask = Mask(torch.tensor([seed], device=x.device), threshold_of(dropout_p), first_column, width)
        scale *= factor_of(mask.threshold)
    output = _QuantisedLinear.apply(rows.reshape(-1, x.shape[-1]), weight, *others, scale, mask)
    return torch.ops.aten._unsafe_view(output, (*x.shape[:-1], weight.shape[0]))


@extension.when_loaded
def _describe() -> None:
    @torch.library.register_fake("mswift::quantised_product")
    def _(
        x: Tensor, codes: Tensor, scales: Tensor, rows: int, columns: int, block: int, bias: Any, low: Any, up: Any, by_columns: bool, _: Any
    ) -> Tensor:
        return x.new_empty(x.shape[0], columns if by_columns else rows)
