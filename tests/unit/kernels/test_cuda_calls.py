"""The calls of the CUDA library with tensors: run on the execution model of csrc/emu, which takes the tensors of a CPU for those of a device."""

from __future__ import annotations

import ctypes

import pytest
import torch

from mswift.kernels import cuda, cuda_head, cuda_rows, linear_softmax
from tests.gpu.checks import CHECKS
from tests.unit.kernels.emulated import Emulated


@pytest.fixture(scope="module")
def library() -> cuda.Library:
    return Emulated()


@pytest.mark.parametrize("name", CHECKS)
def test_operators_agree_with_torch(library: cuda.Library, name: str) -> None:
    CHECKS[name](library, "cpu")


def test_the_head_says_what_the_reference_says(library: cuda.Library) -> None:
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((5, 32), (140, 32), (140,)))
    labels, limits = torch.tensor([3, -1, 120, 0, 77]), linear_softmax.Limits(130, 0.9, 5.0)
    got = cuda_head.linear_softmax(library, hidden, weight, bias, labels, *limits, 2)
    want = linear_softmax._reference_statistics(hidden, weight, bias, labels, limits, 2)
    for number, (mine, other) in enumerate(zip((*got[0], *got[1:]), want)):
        assert torch.allclose(mine, other, rtol=3e-2, atol=3e-2 * other[other.isfinite()].abs().max().item()), number
    factors = torch.randn(4, 5)
    factors[0] = want.reference + want.others.log()
    mine = cuda_head.linear_softmax_grad_weight(library, hidden, weight, bias, labels, factors, *limits)
    other = linear_softmax._reference_weight_gradient(hidden, weight, bias, labels, factors, limits)
    for number, pair in enumerate(zip(mine, other)):
        assert torch.allclose(pair[0].float(), pair[1].float(), rtol=3e-2, atol=1e-2 * pair[1].abs().max().item()), number


def test_a_failed_launch_is_an_error_with_its_reason(library: cuda.Library) -> None:
    x = torch.zeros(2, 1, 6)
    with pytest.raises(RuntimeError, match=r"mswift_rope on cpu: .* \(code -1\)"):
        library.call("mswift_rope", x, 0, x, x, x, x, 2, 1, 6, 8, 1, 6, 6, 6, 6, 0, 1)
    with pytest.raises(AssertionError, match="dense"):
        cuda_rows.gather_rows(library, torch.zeros(4, 6).t(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ctypes.ArgumentError):
        library.call("mswift_gather_rows", x, 0, x, x, x, 0.5, 6)


def test_the_library_is_left_alone_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSWIFT_CUDA", "0")
    assert cuda.missing() == "MSWIFT_CUDA=0"
    monkeypatch.delenv("MSWIFT_CUDA")
    if not torch.cuda.is_available():
        assert cuda.missing() == "no CUDA device"
    assert cuda.library.cache_info().currsize in (0, int(torch.cuda.is_available()))
