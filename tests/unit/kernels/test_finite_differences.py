"""Gradients of the compiled operators against differences of what they compute: along random directions, for every operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels.elementwise import GELU_TANH, SILU, Gate, add_rms_norm, gated_activation, rms_norm, rotate
from mswift.kernels.linear_log_probs import linear_log_probs
from mswift.kernels.lora_linear import lora_linear
from mswift.kernels.packed_attention import packed_attention
from mswift.kernels.quantised_linear import quantise_int8, quantise_nf4, quantised_linear

pytestmark = [
    pytest.mark.usefixtures("auto_kernels"),
    pytest.mark.skipif(not extension.isa_at_least("avx2"), reason="the compiled kernels are not built, or there is no AVX2"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def agree(function: Callable[..., Any], leaves: list[Tensor], step: float, tolerance: float) -> None:
    """Outputs are fp32 or bf16; they are weighted and summed in fp64, and so is the difference."""

    def outputs(*operands: Tensor) -> list[Tensor]:
        found = function(*operands)
        return list(found) if isinstance(found, tuple) else [found]

    for leaf in leaves:
        leaf.requires_grad_()
    found = outputs(*leaves)
    pull = [draw(*out.shape, seed=7 + i).to(out.dtype) for i, out in enumerate(found)]
    gradients = torch.autograd.grad(found, leaves, pull)

    def value(operands: list[Tensor]) -> float:
        with torch.no_grad():
            return sum(float((out.double() * weight.double()).sum()) for out, weight in zip(outputs(*operands), pull))

    for place, gradient in enumerate(gradients):
        for seed in range(3):
            way = draw(*leaves[place].shape, seed=100 + seed).to(leaves[place].dtype)
            ahead, behind = (
                [leaf.detach() + sign * step * way if i == place else leaf.detach() for i, leaf in enumerate(leaves)] for sign in (1, -1)
            )
            moved = (ahead[place].double() - behind[place].double()) / (2 * step)  # as it was rounded
            measured, told = (value(ahead) - value(behind)) / (2 * step), float((gradient.double() * moved).sum())
            size = float(gradient.double().norm() * moved.norm()) / moved.numel() ** 0.5
            assert size > 0.0, place
            assert abs(measured - told) <= tolerance * max(size, abs(measured)), (place, seed, measured, told)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ids", [False, True])
def test_lora_linear(dropout: float, ids: bool) -> None:
    x, weight, bias = draw(9, 12), draw(10, 12), draw(10)
    adapters: tuple[int, ...] = (2,) if ids else ()
    adapter_ids = torch.arange(9) % 3 - 1 if ids else None
    assert choice.compiled("lora_linear", x)

    def function(x: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, a, b, scale=1.5, dropout_p=dropout, seed=3, factor=factor, adapter_ids=adapter_ids)

    agree(function, [x, draw(*adapters, 4, 12), draw(*adapters, 10, 4), draw(10, seed=1)], 1e-2, 1e-3)


@pytest.mark.parametrize("zero_centred", [False, True])
def test_norms(zero_centred: bool) -> None:
    x, residual, weight = draw(5, 24), draw(5, 24, seed=1), draw(24)
    assert choice.compiled("rms_norm", x)
    agree(lambda x, weight: rms_norm(x, weight, 1e-5, zero_centred=zero_centred), [x.clone(), weight.clone()], 3e-3, 1e-3)
    agree(lambda x, r, weight: tuple(add_rms_norm(x, r, weight, 1e-5, zero_centred=zero_centred)), [x, residual, weight], 3e-3, 1e-3)


@pytest.mark.parametrize("gate", [SILU, GELU_TANH, Gate(slope=1.702, limit=50.0, offset=1.0)])
def test_gates(gate: Gate) -> None:
    x = draw(6, 40)
    assert choice.compiled("gated_activation", x)
    agree(lambda x: gated_activation(x, gate), [x], 3e-3, 1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved: bool) -> None:
    x, angles = draw(5, 2, 3, 16), draw(5, 6)
    assert choice.compiled("rotate", x)
    agree(lambda x: rotate(x, torch.stack((angles.cos(), angles.sin())), interleaved=interleaved), [x], 1e-2, 1e-3)


@pytest.mark.skipif(not extension.isa_at_least("avx512"), reason="no AVX-512 here")
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"chunk": 4}])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention(options: dict[str, Any], with_sinks: bool) -> None:
    q, k, v, sinks = draw(11, 4, 16), draw(11, 2, 16, seed=1), draw(11, 2, 16, seed=2), draw(4)
    bounds = torch.tensor([0, 7, 11], dtype=torch.int32)
    assert choice.compiled("attention", q, k, v)

    def function(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        return packed_attention(q, k, v, bounds, sinks=sinks[0] if sinks else None, **options)

    agree(function, [q, k, v, *([sinks] if with_sinks else [])], 3e-3, 1e-3)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_head(softcap: float | None) -> None:
    hidden, weight, bias, labels = draw(5, 12), draw(30, 12) / 3, draw(30), torch.arange(5) * 5
    assert choice.compiled("linear_cross_entropy", hidden, weight)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_log_probs(hidden, weight, labels, bias=bias, softcap=softcap, entropy_grad=True))

    agree(function, [hidden, weight, bias], 3e-3, 1e-3)


@pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="no AVX512-BF16 here")
@pytest.mark.parametrize("quantise", [quantise_nf4, quantise_int8])
def test_quantised_linear(quantise: Callable[[Tensor], Any]) -> None:
    """bf16 only, and linear in each operand: steps as long as the operands, and tolerances of bf16."""
    x, weight = draw(9, 64).bfloat16(), quantise(draw(32, 64).bfloat16())
    assert choice.compiled("quantised_linear", x, weight.codes)
    leaves = [x, draw(4, 64).bfloat16(), draw(32, 4).bfloat16()]
    agree(lambda x, a, b: quantised_linear(x, weight, None, a, b, scale=1.5), leaves, 1.0, 2e-2)
