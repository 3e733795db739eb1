"""Linear layers of all experts in one call: equal to float64 and to one linear layer after another, adapters and dropout included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels.cuda_abi import Dropout
from mswift.kernels.dropout import factor_of, kept, threshold_of
from mswift.kernels.grouped_linear import grouped_linear, lora_grouped_linear
from tests.unit.csrc.product_cases import mask_of

SCALE = 1.7
pytestmark = pytest.mark.usefixtures("auto_kernels")
needs_kernel = pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the compiled kernels are not there, or the CPU has no bf16")
Tensors = dict[str, Tensor]


def draw(counts: list[int], into: int, out: int, rank: int, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    groups = len(counts)
    return {
        "x": random(sum(counts), into),
        "weights": random(groups, out, into) / into**0.5,
        "biases": random(groups, out),
        "lora_a": random(groups, rank, into) / into**0.5,
        "lora_b": random(groups, out, rank),
        "pull": random(sum(counts), out),
        "seeds": torch.randint(0, 2**62, (groups,), generator=generator),
    }


def by_definition(t: Tensors, counts: list[int], p: float, first: int, full: int, *, adapter: bool) -> Tensor:
    """One expert after another."""
    outputs = []
    for e, x in enumerate(t["x"].split(counts)):
        outputs.append(x @ t["weights"][e].t() + t["biases"][e])
        if adapter:
            mask = torch.from_numpy(mask_of(*x.shape, Dropout(int(t["seeds"][e]), 0, first, full, threshold_of(p)))) if p else 1.0
            seen = x * mask
            outputs[-1] = outputs[-1] + SCALE * (seen @ t["lora_a"][e].t()) @ t["lora_b"][e].t()
    return torch.cat(outputs)


def results(function: Callable[[Tensors], Tensor], tensors: Tensors, dtype: torch.dtype, names: list[str]) -> dict[str, Tensor]:
    """Output and gradients; of values that bf16 can hold, computed in `dtype`."""
    inputs = {name: tensor if name == "seeds" else tensor.bfloat16().to(dtype).requires_grad_(name in names) for name, tensor in tensors.items()}
    output = function(inputs)
    gradients = torch.autograd.grad(output, [inputs[name] for name in names], inputs["pull"].detach())
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def distance(found: Tensor, wanted: Tensor, size: Tensor | None = None) -> float:
    """Relative to what is wanted, or to the `size` of what was added up for it: few numbers may cancel to nearly nothing."""
    return float((found.double() - wanted).norm() / (wanted if size is None else size).norm().clamp(min=1e-6))


def absolute(tensors: Tensors) -> Tensors:
    """Nothing cancels in a product of these: values and gradients are the sums of all terms without their signs."""
    return {name: tensor.abs() for name, tensor in tensors.items()}


def call(t: Tensors, counts: list[int], p: float = 0.0, first: int = 0, full: int | None = None) -> Tensor:
    given = (t["x"], t["weights"], torch.tensor(counts), t["biases"], t["lora_a"], t["lora_b"])
    return lora_grouped_linear(*given, scale=SCALE, dropout_p=p, seeds=t["seeds"], first_column=first, full_width=full)


COUNTS = st.lists(st.integers(0, 15), min_size=1, max_size=5).filter(sum)
SHAPES: dict[str, Any] = {"counts": COUNTS, "into": st.integers(1, 150), "out": st.integers(1, 150), "seed": st.integers(0, 99)}


@settings(max_examples=40, deadline=None)
@given(**SHAPES, bf16=st.booleans())
def test_without_adapters(counts: list[int], into: int, out: int, seed: int, bf16: bool) -> None:
    tensors, names = draw(counts, into, out, 1, seed), ["x", "weights", "biases"]
    exact = results(lambda t: by_definition(t, counts, 0.0, 0, 0, adapter=False), tensors, torch.float64, names)
    sizes = results(lambda t: by_definition(t, counts, 0.0, 0, 0, adapter=False), absolute(tensors), torch.float64, names)
    found = results(
        lambda t: grouped_linear(t["x"], t["weights"], torch.tensor(counts), t["biases"]), tensors, torch.bfloat16 if bf16 else torch.float32, names
    )
    for name, wanted in exact.items():
        assert distance(found[name], wanted, sizes[name]) < (4e-3 if bf16 else 1e-6), name


@settings(max_examples=40, deadline=None)
@given(**SHAPES, rank=st.integers(1, 40), p=st.sampled_from([0.0, 0.1, 0.6]), first=st.integers(0, 9), missing=st.integers(0, 3))
def test_with_adapters(counts: list[int], into: int, out: int, seed: int, rank: int, p: float, first: int, missing: int) -> None:
    tensors, names = draw(counts, into, out, rank, seed), ["x", "biases", "lora_a", "lora_b"]
    full = max(1, first + into - missing)
    exact = results(lambda t: by_definition(t, counts, p, first, full, adapter=True), tensors, torch.float64, names)
    sizes = results(lambda t: by_definition(t, counts, p, first, full, adapter=True), absolute(tensors), torch.float64, names)
    single = results(lambda t: call(t, counts, p, first, full), tensors, torch.float32, names)
    narrow = results(lambda t: call(t, counts, p, first, full), tensors, torch.bfloat16, names)
    for name, wanted in exact.items():
        assert distance(single[name], wanted, sizes[name]) < 1e-6, name
        assert distance(narrow[name], wanted, sizes[name]) < 8e-3, name  # two roundings on the way to one number


@needs_kernel
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_kernel_is_no_worse_than_plain_torch_in_bf16(p: float) -> None:
    counts = [16, 0, 40, 3, 64, 1]
    tensors, names = draw(counts, 200, 330, 8), ["x", "biases", "lora_a", "lora_b"]
    exact = results(lambda t: by_definition(t, counts, p, 0, 200, adapter=True), tensors, torch.float64, names)
    errors = {}
    for kernels in ("grouped_linear", "reference"):
        choice.select(kernels)
        found = results(lambda t: call(t, counts, p), tensors, torch.bfloat16, names)
        errors[kernels] = {name: distance(found[name], wanted) for name, wanted in exact.items()}
    for name, error in errors["grouped_linear"].items():
        assert error < max(1.05 * errors["reference"][name], 1.7e-3), name
    assert errors["grouped_linear"]["output"] < errors["reference"]["output"], "the kernel did not run"


@needs_kernel
def test_a_row_does_not_depend_on_the_others_nor_on_threads() -> None:
    counts = [30, 0, 7, 90]
    tensors = {name: tensor if name == "seeds" else tensor.bfloat16() for name, tensor in draw(counts, 96, 300, 8).items()}
    weights, whole = tensors["weights"], grouped_linear(tensors["x"], tensors["weights"], torch.tensor(counts))
    alone = grouped_linear(tensors["x"][36:37], weights, torch.tensor([0, 0, 1, 0]))
    assert torch.equal(alone[0], whole[36])
    apart = grouped_linear(tensors["x"], [weight.t().contiguous().t() for weight in weights], torch.tensor(counts))
    assert torch.equal(apart, whole), "a transposed weight is another one"
    strided = torch.stack((tensors["x"], tensors["x"]), dim=2)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(grouped_linear(strided, weights, torch.tensor(counts)), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(grouped_linear(tensors["x"], weights, torch.tensor(counts)), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_without_rows_and_no_rows_at_all(dtype: torch.dtype) -> None:
    tensors, names = draw([0, 5, 0], 20, 12, 3), ["x", "weights", "lora_a", "lora_b"]
    found = results(lambda t: call(t, [0, 5, 0]), tensors, dtype, names)
    for name in names[1:]:
        assert found[name][0].count_nonzero() == found[name][2].count_nonzero() == 0
        assert found[name][1].count_nonzero() > 0
    nothing = results(lambda t: call(t, [0, 0, 0]), draw([0, 0, 0], 20, 12, 3), dtype, names)
    assert nothing["output"].shape == (0, 12)
    assert all(nothing[name].count_nonzero() == 0 for name in names)


def test_gradcheck() -> None:
    counts = [2, 0, 3]
    tensors = draw(counts, 5, 4, 2)
    names = ["x", "weights", "biases", "lora_a", "lora_b"]

    def function(*parts: Tensor) -> Tensor:
        return call({**tensors, **dict(zip(names, parts))}, counts, 0.3)

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])
    assert not call({**tensors, **{name: tensors[name].detach() for name in names}}, counts).requires_grad


@needs_kernel
def test_autocast_recomputation_and_compile() -> None:
    counts = [6, 0, 9]
    tensors = {name: tensor if name == "seeds" else tensor.float() for name, tensor in draw(counts, 40, 24, 4).items()}
    narrow = {name: tensor if name == "seeds" else tensor.bfloat16() for name, tensor in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(tensors, counts), call(narrow, counts))
    x, lora_a = narrow["x"].requires_grad_(), narrow["lora_a"].requires_grad_()
    plain = torch.autograd.grad(call(narrow, counts, 0.2), (x, lora_a), narrow["pull"])
    again = torch.utils.checkpoint.checkpoint(lambda x: call({**narrow, "x": x}, counts, 0.2), x, use_reentrant=False)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(again, (x, lora_a), narrow["pull"]), plain, strict=True))
    number = torch.tensor(counts)
    compiled = torch.compile(lambda x, weights: 2 * grouped_linear(x, weights, number).sin(), backend="aot_eager", fullgraph=True)
    weights = narrow["weights"].requires_grad_()
    outputs = [compiled(x, weights), 2 * grouped_linear(x, weights, number).sin()]
    assert torch.equal(*outputs)
    first, second = (torch.autograd.grad(output.float().sum(), (x, weights)) for output in outputs)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@needs_kernel
def test_what_torch_checks_of_an_operator() -> None:
    counts = [4, 0, 7]
    t = {name: tensor if name == "seeds" else tensor.bfloat16() for name, tensor in draw(counts, 40, 24, 4).items()}
    number, low = torch.tensor(counts), draw(counts, 4, 1, 1)["x"].bfloat16()
    lists = {name: list(t[name].unbind()) for name in ("weights", "biases", "lora_a", "lora_b")}
    ops = torch.ops.mswift
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.grouped_product.default, (t["x"], lists["weights"], number, lists["biases"], low, lists["lora_b"], False, 1.0, None, 0, 0, 0)),
        (ops.grouped_product.default, (t["pull"], lists["weights"], number, [], low, lists["lora_a"], True, 1.0, t["seeds"], 26, 3, 40)),
        (ops.grouped_outer.default, (low, t["x"], number, t["seeds"], 26, 0, 40)),
    ]
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@needs_kernel
def test_arguments_are_named_in_errors() -> None:
    t = {name: tensor if name == "seeds" else tensor.bfloat16() for name, tensor in draw([2, 3], 8, 6, 2).items()}
    x, weights, biases, b = t["x"], list(t["weights"]), list(t["biases"]), list(t["lora_b"])
    counts, low = torch.tensor([2, 3]), x[:, :2]

    def product(x: Tensor, weights: list[Tensor], counts: Tensor, biases: list[Tensor] = [], low: Any = None, up: list[Tensor] = []) -> Tensor:  # noqa: B006
        return torch.ops.mswift.grouped_product(x, weights, counts, biases, low, up, False, 1.0, None, 0, 0, 0)

    product(x, weights, counts, biases, low, b)
    for wrong, message in (
        (lambda: product(x, weights, torch.tensor([2, 2])), "counts: sum to 4, but there are 5 rows"),
        (lambda: product(x, weights, torch.tensor([6, -1])), "counts: got -1 rows"),
        (lambda: product(x, weights, torch.tensor([5])), "counts: wanted int64"),
        (lambda: product(x[None], weights, counts), "x: wanted"),
        (lambda: product(x[:, :7], weights, counts), "x: wanted"),
        (lambda: product(x, [weights[0], weights[1][:3]], counts), "weights: wanted matrices of one shape"),
        (lambda: product(x, weights, counts, [bias[:3] for bias in biases]), "biases: wanted"),
        (lambda: product(x, weights, counts, [], low, [up[:3] for up in b]), "up: wanted"),
        (lambda: product(x, weights, counts, [], low[:2], b), "low: wanted the rows of x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            wrong()
    assert "float" in (choice.hindrance("grouped_linear", x.float(), *weights) or "")


def test_the_mask_is_that_of_the_header() -> None:
    for seed, threshold, first, full in ((0, 26, 0, 37), (2**61 + 12345, 200, 5, 30), (2**40 + 7, 1, 3, 100)):
        found = kept(torch.full((9,), seed), torch.arange(9), (first, first + 37), full, threshold)
        assert found.tolist() == (mask_of(9, 37, Dropout(seed, 0, first, full, threshold)) > 0).tolist()
    many = kept(torch.full((300,), 5), torch.arange(300), (0, 400), 400, 26)
    assert many.float().mean().item() == pytest.approx(1 - 26 / 256, abs=5e-3)
    assert (threshold_of(0.0), threshold_of(1e-4), threshold_of(0.1)) == (0, 1, 26)
    assert factor_of(26) == 256 / 230
