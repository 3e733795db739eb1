"""The operators in graphs that torch.compile's own backend compiles, forward and backward: as without it. In fp32 and bf16 as the faces take them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mswift.kernels import extension
from mswift.kernels.elementwise import GELU_TANH, add_rms_norm, gated_activation, rms_norm, rotate
from mswift.kernels.grouped_linear import lora_grouped_linear
from mswift.kernels.linear_cross_entropy import linear_cross_entropy
from mswift.kernels.lora_linear import lora_linear
from mswift.kernels.permute import permute, unpermute
from tests.unit.kernels.emulated import relative

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the compiled kernels are not there, or take no bfloat16 here"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: inductor cannot compile"),
]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh(auto_kernels: None) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(function: Callable[..., Tensor], *inputs: Tensor, limit: float = 1e-6) -> None:
    """Values and gradients with inductor and without."""
    found = []
    for run in (function, torch.compile(function, backend="inductor")):
        leaves = [part.detach().requires_grad_() for part in inputs]
        out = run(*leaves)
        found.append((out, *torch.autograd.grad(out, leaves, draw(*out.shape, seed=9, dtype=out.dtype))))
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert relative(other, mine) <= limit


def test_between_the_products() -> None:
    """A norm with its residual, a gate and a rotation with what plain torch does around them."""
    angles = draw(5, 6, seed=5)
    table = torch.stack((angles.cos(), angles.sin()))

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normal, total = add_rms_norm(x, residual, weight, 1e-5)
        turned = rotate((normal * 2).unflatten(-1, (2, 24)), table, interleaved=False).flatten(2)
        return gated_activation(turned + rms_norm(total, weight, 1e-5, zero_centred=True), GELU_TANH).sin()

    same(block, draw(5, 2, 48), draw(5, 2, 48, seed=1), draw(48, seed=2))


def test_a_layer_with_its_adapter_and_the_loss() -> None:
    weight, head, labels = draw(48, 32, seed=3, dtype=BF16), draw(200, 48, seed=4, dtype=BF16), torch.arange(6) * 30

    def loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = lora_linear(x * 1.5, weight, None, a, b, scale=0.5, dropout_p=0.25, seed=3)
        return linear_cross_entropy(hidden, head, labels)

    same(loss, draw(6, 32, dtype=BF16), draw(4, 32, seed=1, dtype=BF16), draw(48, 4, seed=2, dtype=BF16), limit=5e-3)


def test_experts() -> None:
    counts, places = torch.tensor([3, 0, 5]), torch.tensor([[0, 3], [4, 1], [2, 5], [6, 7]])
    weights = draw(3, 32, 32, seed=3, dtype=BF16)

    def layer(x: Tensor, a: Tensor, b: Tensor, mix: Tensor) -> Tensor:
        out = lora_grouped_linear(permute(x, places, 8), weights, counts, None, a, b, scale=0.5)
        return unpermute(out, places, mix.softmax(-1))

    inputs = (draw(4, 32, dtype=BF16), draw(3, 4, 32, seed=1, dtype=BF16), draw(3, 32, 4, seed=2, dtype=BF16), draw(4, 2, seed=5))
    same(layer, *inputs, limit=5e-3)
