"""The fused adapter against its plain composition: values, gradients, dropout that does not depend on the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels.lora_linear import keep_mask, lora_linear
from tests.distributed.harness import run_distributed

SCALE, SEED = 1.7, 11


def factors(tokens: int, into: int, out: int, rank: int, *, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": random(tokens, into).requires_grad_(),
        "weight": random(out, into),
        "bias": random(out).requires_grad_() if bias else None,
        "lora_a": random(rank, into).requires_grad_(),
        "lora_b": random(out, rank).requires_grad_(),
    }


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask: Tensor | None) -> Tensor:
    output = x @ weight.t() + SCALE * ((x if mask is None else x * mask) @ lora_a.t()) @ lora_b.t()
    return output if bias is None else output + bias


def gradients(output: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Of a fixed projection of the output, by name."""
    wanted = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view_as(output)
    return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), upstream)))


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 17),
    into=st.integers(1, 13),
    out=st.integers(1, 11),
    rank=st.integers(1, 5),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.7]),
    seed=st.integers(0, 50),
)
def test_values_and_gradients(tokens: int, into: int, out: int, rank: int, bias: bool, dropout: float, seed: int) -> None:
    tensors = factors(tokens, into, out, rank, bias=bias, seed=seed)
    mask = keep_mask((tokens, into), (0, into), dropout, SEED, tensors["x"]) if dropout else None
    found = lora_linear(**tensors, scale=SCALE, dropout_p=dropout, seed=SEED)
    expected = plain(**tensors, mask=mask)
    torch.testing.assert_close(found, expected)
    ours, theirs = gradients(found, tensors), gradients(expected, tensors)
    assert set(ours) == {"x", "lora_a", "lora_b"} | ({"bias"} if bias else set())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout: float) -> None:
    tensors = factors(3, 5, 4, 2, bias=True)

    def function(x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return lora_linear(x, tensors["weight"], bias, lora_a, lora_b, scale=SCALE, dropout_p=dropout, seed=SEED)

    assert torch.autograd.gradcheck(function, [tensors[name] for name in ("x", "bias", "lora_a", "lora_b")])
    assert not tensors["weight"].requires_grad


def test_leading_dimensions_and_inputs_without_gradient() -> None:
    tensors = factors(12, 5, 4, 2, bias=False)
    tensors["x"] = tensors["x"].detach().view(3, 4, 5).transpose(0, 1)
    found = lora_linear(**tensors, scale=SCALE)
    assert found.shape == (4, 3, 4)
    torch.testing.assert_close(found, plain(**tensors, mask=None))
    assert set(gradients(found, tensors)) == {"lora_a", "lora_b"}


def test_bf16_is_rounded_once() -> None:
    tensors = factors(20, 48, 36, 4, bias=True, dtype=torch.bfloat16)
    found = lora_linear(**tensors, scale=SCALE)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    expected = plain(**wide, mask=None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=2**-6 * expected.abs().max().item(), rtol=2**-6)
    ours, theirs = gradients(found, tensors), gradients(expected, {name: wide[name] for name in ("x", "bias", "lora_a", "lora_b")})
    for name, gradient in ours.items():
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - theirs[name]).norm() < 2**-6 * theirs[name].norm(), name


# ---- dropout -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_the_mask_keeps_the_mean(p: float) -> None:
    mask = keep_mask((400, 500), (0, 500), p, SEED, torch.empty(0))
    rate = max(1, round(p * 256)) / 256
    values = mask.unique().tolist()
    assert values == pytest.approx([0.0, 1 / (1 - rate)])
    deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert (mask == 0).float().mean().item() == pytest.approx(rate, abs=5 * deviation)
    assert mask.mean().item() == pytest.approx(1.0, abs=5 * deviation / (1 - rate))
    rows, columns = (mask == 0).float().mean(1), (mask == 0).float().mean(0)
    assert rows.std().item() == pytest.approx((rate * (1 - rate) / 500) ** 0.5, rel=0.3), "rows depend on each other"
    assert columns.std().item() == pytest.approx((rate * (1 - rate) / 400) ** 0.5, rel=0.3), "columns depend on each other"


def test_the_mask_is_named_by_its_seed() -> None:
    like = torch.empty(0)
    first, again, other = (keep_mask((64, 64), (0, 64), 0.5, seed, like) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert 0.4 < (first == other).float().mean() < 0.6
    state = torch.get_rng_state()
    keep_mask((64, 64), (0, 64), 0.5, 3, like)
    assert torch.equal(torch.get_rng_state(), state), "the common generator has moved"


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 24), parts=st.sampled_from([1, 2, 3, 4]), padding=st.integers(0, 8), seed=st.integers(0, 9))
def test_ranks_cut_one_mask(rows: int, width: int, parts: int, padding: int, seed: int) -> None:
    """The parts side by side are the whole; what a rank holds beyond the real columns is zero."""
    part = -(-(width + padding) // parts)
    like = torch.empty(0)
    cut = [keep_mask((rows, width), (i * part, (i + 1) * part), 0.4, seed, like) for i in range(parts)]
    assert all(mask.shape == (rows, part) for mask in cut)
    joined = torch.cat(cut, 1)
    assert torch.equal(joined[:, :width], keep_mask((rows, width), (0, width), 0.4, seed, like))
    assert joined[:, width:].count_nonzero() == 0


# ---- several ranks -------------------------------------------------------------------------------------------------------------------

SIZES = {"tokens": 9, "into": 12, "out": 8, "rank": 3}
DROPOUT = 0.4


def _parallel(rank: int, world: int, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    import torch.distributed as dist

    tensors, group = factors(**SIZES, bias=False), dist.group.WORLD
    cut = {"column": {"weight": 0, "lora_b": 0}, "row": {"x": 1, "weight": 1, "lora_a": 1}}[kind]
    for name, dim in cut.items():
        needed = tensors[name].requires_grad
        tensors[name] = tensors[name].detach().chunk(world, dim)[rank].contiguous().requires_grad_(needed)
    common = {"scale": SCALE, "dropout_p": DROPOUT, "seed": SEED}
    if kind == "column":
        output = lora_linear(**tensors, **common, group=group)
        upstream = torch.linspace(-1, 1, SIZES["tokens"] * SIZES["out"], dtype=torch.float64).view(SIZES["tokens"], -1).chunk(world, 1)[rank]
        names = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
        return output.detach(), dict(zip(names, torch.autograd.grad(output, [tensors[name] for name in names], upstream)))
    part = SIZES["into"] // world
    output = lora_linear(**tensors, **common, first_column=rank * part, full_width=SIZES["into"])
    return output.detach(), gradients(output, tensors)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_column_and_row_parallel(kind: str, world: int) -> None:
    ranks = run_distributed(_parallel, world, kind)
    tensors = factors(**SIZES, bias=False)
    mask = keep_mask((SIZES["tokens"], SIZES["into"]), (0, SIZES["into"]), DROPOUT, SEED, tensors["x"])
    expected = plain(**tensors, mask=mask)
    outputs = [output for output, _ in ranks]
    torch.testing.assert_close(torch.cat(outputs, 1) if kind == "column" else torch.stack(outputs).sum(0), expected)
    dims = {"column": {"lora_b": 0}, "row": {"x": 1, "lora_a": 1}}[kind]
    partial = {"column": "lora_a", "row": "lora_b"}[kind]
    for name, gradient in gradients(expected, tensors).items():
        parts = [found[name] for _, found in ranks]
        if name in dims:
            whole = torch.cat(parts, dims[name])
        elif name == partial:
            whole = torch.stack(parts).sum(0)
        else:
            whole = parts[0]
            assert all(torch.equal(part, whole) for part in parts), "it was summed over the ranks"
        torch.testing.assert_close(whole, gradient)
