"""Gradients of gradients: right where an operator is linear or plain torch runs, one clear error everywhere else, never a number that is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels.causal_attention import causal_attention
from mswift.kernels.elementwise import SILU, add_rms_norm, gated_activation, rms_norm, rotate
from mswift.kernels.grouped_linear import grouped_linear, lora_grouped_linear
from mswift.kernels.linear_cross_entropy import linear_cross_entropy
from mswift.kernels.linear_kl import linear_kl
from mswift.kernels.linear_log_probs import linear_log_probs
from mswift.kernels.lora_linear import dropout_of, lora_linear
from mswift.kernels.packed_attention import packed_attention
from mswift.kernels.permute import permute, unpermute
from mswift.kernels.quantised_linear import quantise_int8, quantised_linear


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HEAD, LABELS, PLACES = draw(40, 16, seed=1), torch.tensor([1, 5, 39, 0]), torch.tensor([[0, 3], [4, 1], [2, 5], [6, 7]])
A, B, WEIGHT = draw(2, 16, seed=2), draw(12, 2, seed=3), draw(12, 16, seed=4)
BOUNDS = torch.tensor([0, 1, 4], dtype=torch.int32)
ANGLES = draw(4, 8, seed=5)
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {  # of x [4, 16]
    "lora_linear": lambda x: lora_linear(x, WEIGHT, None, A, B, scale=0.5),
    "grouped_linear": lambda x: grouped_linear(x, draw(2, 12, 16), torch.tensor([1, 3])),
    "lora_grouped_linear": lambda x: lora_grouped_linear(
        x, draw(2, 12, 16), torch.tensor([1, 3]), None, A.expand(2, 2, 16), B.expand(2, 12, 2), scale=0.5
    ),
    "quantised_linear": lambda x: quantised_linear(x, quantise_int8(WEIGHT), None, A, B),
    "linear_log_probs": lambda x: linear_log_probs(x, HEAD, LABELS).log_probs,
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, HEAD, LABELS),
    "smoothed": lambda x: linear_cross_entropy(x, HEAD, LABELS, label_smoothing=0.5),
    "smoothed and capped": lambda x: linear_cross_entropy(x, HEAD, LABELS, label_smoothing=0.5, softcap=3.0),
    "linear_kl": lambda x: linear_kl(x, HEAD, draw(4, 16, seed=6), HEAD),
    "rms_norm": lambda x: rms_norm(x, WEIGHT[0], 1e-3),
    "add_rms_norm": lambda x: add_rms_norm(x, draw(4, 16, seed=7), WEIGHT[0], 1e-3)[0],
    "the sum of add_rms_norm": lambda x: add_rms_norm(x, draw(4, 16, seed=7), WEIGHT[0], 1e-3)[1],
    "gated_activation": lambda x: gated_activation(x, SILU),
    "rotate": lambda x: rotate(x[:, None, None], torch.stack((ANGLES.cos(), ANGLES.sin())), interleaved=False),
    "packed_attention": lambda x: packed_attention(x[:, None], x[:, None], x[:, None], BOUNDS),
    "permute": lambda x: permute(x, PLACES, 8),
    "unpermute": lambda x: unpermute(x.repeat(2, 1), PLACES, draw(4, 2).softmax(-1)),
    "dropout_of": lambda x: dropout_of(x, 0.4, seed=3),
}
if extension.isa_at_least("avx512"):
    OPERATORS["causal_attention"] = lambda x: causal_attention(x[:, None, None], x[:, None, None], x[:, None, None])
NARROW: dict[str, Callable[[Tensor], Tensor]] = {  # whose kernels take bf16 alone
    "grouped_linear": lambda x: grouped_linear(x, draw(2, 12, 16).to(x.dtype), torch.tensor([1, 3])),
    "quantised_linear": lambda x: quantised_linear(x, quantise_int8(WEIGHT), None, A.to(x.dtype), B.to(x.dtype)),
}
LINEAR = {"rotate", "dropout_of"}
"""Their gradients are the operator itself once more."""
OF_TORCH = {"rms_norm", "add_rms_norm", "the sum of add_rms_norm", "gated_activation"}
"""Their references are made of torch's operators, which know their second derivatives."""


def slope(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, step: float = 1e-2) -> float:
    with torch.no_grad():
        return float(function(x + step * direction) - function(x - step * direction)) / (2 * step)


def numeric(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, step: float = 1e-2) -> Tensor:
    """How the gradient of `function` changes in a direction."""
    ends = []
    for sign in (-1, 1):
        leaf = (x + sign * step * direction).detach().requires_grad_()
        ends.append(torch.autograd.grad(function(leaf), leaf)[0])
    return (ends[1] - ends[0]) / (2 * step)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_derivative_is_right_or_refused(name: str, kernels: str, auto_kernels: None) -> None:
    choice.select(kernels)
    operator = OPERATORS[name]
    x, direction = draw(4, 16, seed=8).requires_grad_(), draw(4, 16, seed=9)

    def value(x: Tensor) -> Tensor:
        return operator(x).sin().sum()

    exact = name in LINEAR or (name in OF_TORCH and (kernels == "reference" or extension.missing() is not None))
    if not exact and name in OF_TORCH:
        exact = not extension.isa_at_least("avx2")  # then the kernel does not run
    if exact:
        (gradient,) = torch.autograd.grad(value(x), x, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), x)
        torch.testing.assert_close(second, numeric(value, x, direction), atol=2e-2, rtol=2e-2)
        return
    for function in (value, lambda x: operator(x).sum()):  # the gradient of the operator's output depends on x, or on nothing
        with pytest.raises(RuntimeError, match=r"^\w+ has no second derivative: got create_graph=True|^derivative for .* is not implemented"):
            torch.autograd.grad(torch.autograd.grad(function(x), x, create_graph=True)[0].square().sum(), x)
    (again,) = torch.autograd.grad(value(x), x)
    assert not again.requires_grad
    assert (again * direction).sum() == pytest.approx(slope(value, x, direction), rel=2e-2, abs=2e-2)


@pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="no AVX512-BF16 here")
@pytest.mark.parametrize("name", NARROW)
def test_a_kernel_for_bf16_refuses_it_too(name: str, auto_kernels: None) -> None:
    x = draw(4, 16).bfloat16().requires_grad_()
    assert choice.compiled(name, x, torch.zeros(1, dtype=torch.int8) if name == "quantised_linear" else x)
    with pytest.raises(RuntimeError, match=rf"^{name} has no second derivative: got create_graph=True"):
        torch.autograd.grad(NARROW[name](x).sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(NARROW[name](x).sum(), x)
    assert not gradient.requires_grad
