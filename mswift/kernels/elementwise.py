"""What stands between the products of a block, each in one pass over its tensor: root-mean-square norm, gated activation, rotary positions.

All of it computes in fp32 and rounds once. The plain-torch references are beside the faces that choose between them and the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mswift.kernels import checks, choice, cuda_operators, extension, functions


def _fits(x: Tensor, *others: Tensor) -> str | None:
    if x.device.type == "cuda":
        return cuda_operators.hindrance(x, *others)
    if x.device.type != "cpu":
        return f"no kernel for {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return "takes float32 and bfloat16"
    return None if extension.isa_at_least("avx2") else "needs avx2"


choice.register("rms_norm", "root-mean-square norm in one pass", _fits, on_cuda=True)
choice.register("gated_activation", "silu, gelu (tanh) or a clamped gate, times the other half, in one pass", _fits, on_cuda=True)
choice.register("rotate", "rotary positions in one pass", _fits, on_cuda=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centred: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim.

    Args:
        x: ``[..., hidden]``. weight: ``[hidden]``; `zero_centred`: one is added to it.
    """
    checks.expect("weight", weight, tuple(x.shape[-1:]))
    if choice.compiled("rms_norm", x, weight):
        return torch.ops.mswift.rms_norm(x, weight, eps, zero_centred)[0]
    if zero_centred:  # 1 + weight does not fit into bf16
        return F.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, zero_centred: bool = False) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``: the sum is rounded to the dtype of `x` and then normalised, as two steps would do it."""
    checks.expect("weight", weight, tuple(x.shape[-1:]))
    checks.expect("residual", residual, tuple(x.shape))
    if x.dtype == residual.dtype and choice.compiled("rms_norm", x, weight):
        return torch.ops.mswift.add_rms_norm(x, residual, weight, eps, zero_centred)[:2]
    total = x + residual
    return rms_norm(total, weight, eps, zero_centred=zero_centred), total


@dataclass(frozen=True, slots=True)
class Gate:
    """``a * sigmoid(slope * a * (1 + cubic * a^2)) * (b + offset)`` with a at most `limit` and b within +-limit."""

    slope: float = 1.0
    cubic: float = 0.0
    limit: float = float("inf")
    offset: float = 0.0


SILU = Gate()
GELU_TANH = Gate(slope=2 * (2 / torch.pi) ** 0.5, cubic=0.044715)


def gated_activation(x: Tensor, gate: Gate = SILU) -> Tensor:
    """`x` ``[..., 2 n]``, gates in front -> ``[..., n]``."""
    if not x.dim() or x.shape[-1] % 2:
        raise ValueError(f"x: got {list(x.shape)}, wanted an even number of columns, gate and up side by side")
    if not gate.limit > 0.0:
        raise ValueError(f"gate.limit: got {gate.limit}, wanted more than 0")
    if choice.compiled("gated_activation", x):
        return torch.ops.mswift.gated_activation(x, gate.slope, gate.cubic, gate.limit, gate.offset)
    a, b = x.float().chunk(2, dim=-1)
    a, b = a.clamp(max=gate.limit), b.clamp(min=-gate.limit, max=gate.limit)
    return (a * torch.sigmoid(a * gate.slope * (1.0 + gate.cubic * a * a)) * (b + gate.offset)).to(x.dtype)


def _check_table(table: Tensor, tokens: int, width: int) -> None:
    checks.expect("table", table, (2, tokens, *table.shape[2:3]), torch.float32)
    if table.dim() != 3 or 2 * table.shape[2] > width:
        raise ValueError(f"table: got {list(table.shape)}, wanted [2, {tokens}, at most {width // 2}], half of the columns that are turned")


def rotate(x: Tensor, table: Tensor, *, interleaved: bool) -> Tensor:
    """`x` ``[s, b, heads, dim]`` turned by `table` ``[2, s, r / 2]``: its first r columns, the rest passes through; fp32, rounded once."""
    if x.dim() != 4:
        checks.expect("x", x, ("s", "b", "heads", "dim"))
    _check_table(table, x.shape[0], x.shape[3])
    if choice.compiled("rotate", x):
        return torch.ops.mswift.rotate(x, table, interleaved, False)
    cos, sin = table[:, :, None, None, :]
    width = 2 * table.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        result = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        result = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    result = result.to(x.dtype)
    return torch.cat((result, rest), dim=-1) if rest.shape[-1] else result


def rotate_(x: Tensor, table: Tensor, *, width: int, each: int = 1, turned: int = 1, interleaved: bool) -> Tensor:
    """Rotate heads where they lie, queries and keys straight out of a fused projection for instance; what stood there is not kept.

    Args:
        x: ``[s, b, ...]``, the dims behind the second dense: heads of `width` columns side by side, of every `each` of which the first `turned`
            are rotated. In a graph it should be no view: torch copies the gradient of a view's base.
        table: as for `rotate`.

    Returns:
        `x`.
    """
    columns = x.shape[2:].numel()
    if x.dim() < 3 or not 0 < turned <= each or width < 1 or columns % (each * width):
        raise ValueError(
            f"x: got {list(x.shape)}, wanted [s, b, ...] with a multiple of {each} heads of {width} columns, of which {turned} are turned"
        )
    _check_table(table, x.shape[0], width)
    if choice.compiled("rotate", x):
        torch.ops.mswift.rotate_(x, table, width, each, turned, interleaved, False)
        return x
    heads = x.view(*x.shape[:2], -1, each, width)[..., :turned, :]
    heads.copy_(rotate(heads.flatten(2, 3), table, interleaved=interleaved).view_as(heads))
    return x


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *summands, weight, _, ctx.zero_centred = inputs
    rstd = output[-1]
    ctx.save_for_backward(summands[0] if len(output) == 2 else output[1], weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


@functions.backward("rms_norm")
def _norm_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    d_x, d_weight = _gradients_of_norm(ctx, grad, None, wanted=ctx.needs_input_grad[0], weight_wanted=ctx.needs_input_grad[1])
    return d_x, d_weight, None, None


@functions.backward("rms_norm")
def _add_norm_gradients(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    d_sum, d_weight = _gradients_of_norm(ctx, grad, grad_sum, wanted=any(wanted), weight_wanted=ctx.needs_input_grad[2])
    return d_sum if wanted[0] else None, d_sum if wanted[1] else None, d_weight, None, None


def _gradients_of_norm(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *, wanted: bool, weight_wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of what was normalised, and of the weight."""
    if grad is None:
        return grad_sum, None
    x, weight, rstd = ctx.saved_tensors
    d_x, d_weight = torch.ops.mswift.rms_norm_backward(grad, grad_sum, x, weight, rstd, ctx.zero_centred, weight_wanted)
    return d_x if wanted else None, d_weight.to(weight.dtype) if weight_wanted else None


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.gate = inputs
    ctx.save_for_backward(x)


@functions.backward("gated_activation")
def _gate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.mswift.gated_activation_backward(grad, ctx.saved_tensors[0], *ctx.gate), None, None, None, None


def _keep_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(table)


def _rotation_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.mswift.rotate(grad, ctx.saved_tensors[0], ctx.interleaved, not ctx.back), None, None, None


def _plain(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_norm_backward(
    _grad: Tensor, _grad_sum: Tensor | None, x: Tensor, _weight: Tensor, _rstd: Tensor, _zero_centred: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return _plain(x), x.new_empty(x.shape[-1] if of_weight else 0, dtype=torch.float32)


@extension.when_loaded
def _describe() -> None:
    fake, autograd = torch.library.register_fake, torch.library.register_autograd
    fake("mswift::rms_norm", lambda x, *_: (_plain(x), x.new_empty(x.shape[:-1], dtype=torch.float32)))
    fake("mswift::add_rms_norm", lambda x, *_: (_plain(x), _plain(x), x.new_empty(x.shape[:-1], dtype=torch.float32)))
    fake("mswift::rms_norm_backward", _fake_norm_backward)
    fake("mswift::gated_activation", lambda x, *_: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
    fake("mswift::gated_activation_backward", lambda _, x, *__: _plain(x))
    fake("mswift::rotate", lambda x, *_: _plain(x))
    fake("mswift::rotate_", lambda *_: None)
    autograd("mswift::rms_norm", _norm_gradients, setup_context=_keep_norm)
    autograd("mswift::add_rms_norm", _add_norm_gradients, setup_context=_keep_norm)
    autograd("mswift::gated_activation", _gate_gradients, setup_context=_keep_gate)
    autograd("mswift::rotate", _rotation_gradients, setup_context=_keep_rotation)
