"""The CUDA operators on a device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mswift.kernels import choice, cuda
from mswift.kernels.elementwise import GELU_TANH, add_rms_norm, gated_activation, rotate
from mswift.kernels.grouped_linear import grouped_linear
from mswift.kernels.linear_cross_entropy import linear_cross_entropy
from mswift.kernels.lora_linear import lora_linear
from mswift.kernels.permute import permute, unpermute
from tests.gpu.checks import BF16, CHECKS, some

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=f"CUDA kernels: {cuda.missing()}")]


@pytest.mark.parametrize("name", CHECKS)
def test_operators_on_a_device(name: str) -> None:
    CHECKS[name](cuda.library(), "cuda")


def table() -> Tensor:
    angles = some("cuda", 6, 4, dtype=torch.float32)
    return torch.stack((angles.cos(), angles.sin()))


def counts() -> Tensor:
    return torch.tensor([4, 0, 8], device="cuda")


def places() -> Tensor:
    return torch.arange(12, device="cuda").flip(0).view(6, 2)


FACES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, r, w: torch.stack(add_rms_norm(x, r, w, 1e-5)), ((6, 2, 24), (6, 2, 24), (24,))),
    "gated_activation": (lambda x: gated_activation(x, GELU_TANH), ((6, 48),)),
    "rotate": (lambda x: rotate(x[..., 8:], table(), interleaved=True), ((6, 2, 3, 24),)),
    "linear_cross_entropy": (lambda x, w: linear_cross_entropy(x, w, torch.arange(6, device="cuda")), ((6, 32), (150, 32))),
    "lora_linear": (lambda x, a, b: lora_linear(x, some("cuda", 40, 24), None, a, b, scale=0.5, dropout_p=0.2, seed=4), ((6, 24), (8, 24), (40, 8))),
    "grouped_linear": (lambda x, w: grouped_linear(x, w, counts()), ((12, 24), (3, 40, 24))),
    "permute": (lambda x: unpermute(permute(x, places(), 12), places()), ((6, 24),)),
}


@pytest.mark.parametrize("name", FACES)
def test_the_face_of_each_takes_it(name: str) -> None:
    """Values and gradients of the kernels beside those of plain torch on the same device."""
    function, shapes = FACES[name]
    leaves = [some("cuda", *shape, dtype=BF16, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    found, before = {}, choice.selected()
    try:
        for setting in ("auto", "reference"):
            choice.select(setting)
            out = function(*leaves)
            found[setting] = (out, *torch.autograd.grad(out.float().square().sum(), leaves))
        choice.select("auto")
        assert name in choice.announcement("cuda")
    finally:
        choice.select(before)
    for mine, other in zip(found["auto"], found["reference"], strict=True):
        assert mine.dtype == other.dtype
        assert float((mine.double() - other.double()).norm()) <= 2e-2 * float(other.double().norm())
