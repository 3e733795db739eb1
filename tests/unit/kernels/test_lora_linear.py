"""The fused adapter against its plain composition: values, gradients, dropout that does not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels.lora_linear import NAME, Dropout, dropout_of, keep_mask, lora_linear, stack_targets
from tests.distributed.harness import run_distributed
from tests.unit.kernels.isa import passed_with

SCALE, SEED = 1.7, 11
needs_kernels = pytest.mark.skipif(extension.missing() is not None or not extension.isa_at_least("avx2"), reason="no compiled kernels")
CAN_BF16 = extension.isa_at_least("avx512_bf16")
TYPES = [torch.float32, *([torch.bfloat16] if CAN_BF16 else [])]


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


def pull(tokens: int, out: int) -> Tensor:
    """An upstream gradient whose sums do not vanish."""
    return torch.randn(tokens, out, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.3


def gradients(output: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Of a fixed projection of the output, by name."""
    wanted = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    upstream = pull(output.shape[:-1].numel(), output.shape[-1]).to(output.dtype).view_as(output)
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


def draw(seed: int, row: int, column: int) -> int:
    """Eight bits, as csrc/common/dropout.h describes them, one element at a time."""

    def mix(h: int) -> int:
        h = ((h ^ h >> 16) * 0x7FEB352D) % 2**32
        h = ((h ^ h >> 15) * 0x846CA68B) % 2**32
        return h ^ h >> 16

    of_column = mix((seed % 2**32 + (column // 4) * 0x9E3779B1) % 2**32)
    of_row = row % 2**32 * 0x85EBCA77 + (row >> 32) * 0xC2B2AE3D + (seed >> 32)
    return mix((of_column + of_row) % 2**32) >> 8 * (column % 4) & 255


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 600),
    first=st.tuples(st.sampled_from([0, 3, 2**33]), st.integers(0, 9)),
    missing=st.integers(-5, 40),
    p=st.sampled_from([0.001, 0.1, 0.5, 0.999]),
    seed=st.integers(0, 2**62 - 1),
)
def test_every_implementation_draws_the_same_mask(rows: int, columns: int, first: tuple[int, int], missing: int, p: float, seed: int) -> None:
    row, column = first
    width, threshold = column + columns - missing, max(1, min(255, round(p * 256)))
    kept = [[column + c < width and draw(seed, row + r, column + c) >= threshold for c in range(columns)] for r in range(rows)]
    expected = torch.tensor(kept).float() * (256 / (256 - threshold))
    torch.testing.assert_close(keep_mask((rows, width), (column, column + columns), p, seed, expected, first_row=row), expected)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, columns, dtype=dtype).requires_grad_()
        found = dropout_of(x, p, seed, first_row=row, first_column=column, full_width=width)
        torch.testing.assert_close(found, (x * expected).to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
        assert torch.equal(found != 0, expected * x != 0)
        (gradient,) = torch.autograd.grad(found, x, torch.ones_like(x))
        torch.testing.assert_close(gradient, expected.to(dtype))


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


# ---- compiled ------------------------------------------------------------------------------------------------------------------------


def exact(tensors: dict[str, Any], upstream: Callable[[Tensor], Tensor] = torch.clone, **options: Any) -> dict[str, Tensor]:
    """What `lora_linear` should give, in fp64, written out: the output and the gradients of a fixed projection of it, by name."""
    wide = {name: None if tensor is None else tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    x, weight, bias, a, b, factor = (wide[name] for name in ("x", "weight", "bias", "lora_a", "lora_b", "factor"))
    p, ids = options.get("dropout_p", 0.0), options.get("adapter_ids")
    first = options.get("first_column", 0)
    width = options.get("full_width") or first + x.shape[1]
    kept = x * keep_mask((len(x), width), (first, first + x.shape[1]), p, SEED, x, first_row=options.get("first_row", 0)) if p else x
    if ids is None:
        added = kept @ a.t() @ b.t()
    else:
        added = torch.stack([kept[t] @ a[i].t() @ b[i].t() if i >= 0 else kept[t] @ a[0].t() @ b[0].t() * 0 for t, i in enumerate(ids.tolist())])
    output = x @ weight.t() + SCALE * added
    output = output if factor is None else output * factor
    output = output if bias is None else output + bias
    wanted = {name: tensor for name, tensor in wide.items() if tensor is not None and name != "weight"}
    pulled = upstream(pull(*output.shape))
    return {"output": output.detach(), **dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), pulled)))}


def run(tensors: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    output = lora_linear(**tensors, scale=SCALE, seed=SEED, **options)
    return {"output": output.detach(), **gradients(output, tensors)}


def several(count: int, tensors: dict[str, Any], seed: int = 3) -> tuple[dict[str, Any], Tensor]:
    """As many adapters instead of one, and ids of the tokens; some have none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, count, (len(tensors["x"]),), generator=generator)
    for name in ("lora_a", "lora_b"):
        shape = (count, *tensors[name].shape)
        tensors[name] = torch.randn(*shape, generator=generator).to(tensors[name].dtype).requires_grad_()
    return tensors, ids


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert set(found) == set(truth)
    return max(((found[name].double() - value).norm() / value.norm().clamp_min(1e-30)).item() for name, value in truth.items() if value.numel())


@pytest.fixture(params=["compiled", "reference"])
def implementation(request: pytest.FixtureRequest) -> Any:
    if request.param == "compiled" and extension.missing() is not None:
        pytest.skip("no compiled kernels")
    choice.select("auto" if request.param == "compiled" else "reference")
    yield request.param
    choice.select("auto")


@pytest.mark.usefixtures("implementation")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([1, 5, 64, 131, 300]),
    into=st.sampled_from([2, 62, 130, 1100, 2300]),
    out=st.sampled_from([2, 66, 200]),
    rank=st.sampled_from([2, 8, 70]),
    bias=st.booleans(),
    dora=st.booleans(),
    adapters=st.sampled_from([0, 0, 1, 3]),
    dropout=st.sampled_from([0.0, 0.1, 0.6]),
    place=st.sampled_from([{}, {"first_row": 7, "first_column": 3}, {"first_column": 6, "full_width": 60}]),
    dtype=st.sampled_from(TYPES),
)
@example(tokens=300, into=2300, out=2, rank=2, bias=False, dora=True, adapters=3, dropout=0.0, place={}, dtype=torch.float32)  # sums that cancel
def test_against_fp64(
    tokens: int, into: int, out: int, rank: int, bias: bool, dora: bool, adapters: int, dropout: float, place: dict[str, int], dtype: torch.dtype
) -> None:
    tensors = factors(tokens, into, out, rank, bias=bias, dtype=dtype)
    tensors["factor"] = torch.linspace(0.5, 1.5, out).requires_grad_() if dora else None
    options: dict[str, Any] = {"dropout_p": dropout, **place}
    if adapters:
        tensors, options["adapter_ids"] = several(adapters, tensors)
    found, truth = run(tensors, **options), exact(tensors, **options)
    assert found["output"].dtype == dtype
    absolute = exact({name: None if tensor is None else tensor.abs() for name, tensor in tensors.items()}, **options, upstream=torch.abs)
    assert set(found) == set(truth)
    relative, beside = (1e-5, 3e-7) if dtype == torch.float32 else (0.0, 1.2e-2)
    for name, value in truth.items():  # or beside sums that do not cancel: no order of additions in fp32 does better than that
        assert (found[name].double() - value).norm() <= max(relative * value.norm(), beside * absolute[name].norm()), name


@needs_kernels
@pytest.mark.skipif(not CAN_BF16, reason="needs AVX512-BF16")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_bf16_is_no_worse_than_eager(dropout: float) -> None:
    tensors = {**factors(200, 576, 320, 8, bias=False, dtype=torch.bfloat16), "factor": None}
    with torch.no_grad():
        tensors["weight"] *= 0.05
        tensors["lora_a"] *= 0.05
    truth, found = exact(tensors, dropout_p=dropout), run(tensors, dropout_p=dropout)
    mask = keep_mask((200, 576), (0, 576), dropout, SEED, tensors["x"]) if dropout else None
    plainly = plain(**{name: tensor for name, tensor in tensors.items() if name != "factor"}, mask=mask)
    eager = {"output": plainly.detach(), **gradients(plainly, tensors)}
    for name, value in truth.items():
        error, of_eager = ((part[name].double() - value).norm() / value.norm() for part in (found, eager))
        assert error < 1.02 * of_eager, name
        assert error > 1e-4, "they are not computed in fp64"


def test_strided_and_empty_inputs(implementation: str) -> None:
    tensors = {**factors(70, 36, 48, 4, bias=True, dtype=torch.float32), "factor": None}
    expected = run(tensors)
    strided = {name: tensor if tensor is None or tensor.dim() < 2 else tensor.detach().t().contiguous().t() for name, tensor in tensors.items()}
    strided = {name: tensor if tensor is None else tensor.requires_grad_(tensors[name].requires_grad) for name, tensor in strided.items()}
    assert not strided["x"].is_contiguous()
    assert worst(run(strided), {name: tensor.double() for name, tensor in expected.items()}) < 1e-6
    none = run({**tensors, "x": tensors["x"].detach()[:0].requires_grad_()}, dropout_p=0.1)
    assert none["output"].shape == (0, 48)
    assert none["x"].shape == (0, 36)
    assert all(none[name].count_nonzero() == 0 and none[name].shape == tensors[name].shape for name in ("lora_a", "lora_b", "bias"))
    broadcast = torch.autograd.grad(lora_linear(**tensors, scale=SCALE).sum(), tensors["lora_b"])[0]  # its gradient has strides of 0
    assert broadcast.shape == (48, 4)
    torch.testing.assert_close(broadcast[0], broadcast[1])
    assert choice.compiled(NAME, *(tensors[name] for name in ("x", "weight", "lora_a", "lora_b"))) == (implementation == "compiled")


def test_recomputation_and_autocast(implementation: str) -> None:
    tensors = {**factors(40, 36, 48, 4, bias=True, dtype=torch.float32), "factor": torch.rand(48).requires_grad_()}

    def layer(x: Tensor) -> Tensor:
        return lora_linear(**{**tensors, "x": x}, scale=SCALE, seed=SEED, dropout_p=0.4)

    again = torch.utils.checkpoint.checkpoint(layer, tensors["x"], use_reentrant=False)
    expected = layer(tensors["x"])
    assert torch.equal(again, expected)
    truth = gradients(expected, tensors)
    for one, other in zip(gradients(again, tensors).values(), truth.values(), strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(tensors["x"])
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() < 2**-6 * expected.norm()
    found = gradients(low, tensors)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}, implementation
    assert (found["lora_a"] - truth["lora_a"]).norm() < 2**-5 * found["lora_a"].norm()


@needs_kernels
def test_the_same_bits_for_any_number_of_threads() -> None:
    tensors = {**factors(300, 1300, 200, 8, bias=True, dtype=TYPES[-1]), "factor": torch.rand(200).requires_grad_()}
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(tensors, dropout_p=0.2))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())
    assert len(results[0]) == 6


@needs_kernels
def test_opcheck() -> None:
    ops = torch.ops.mswift
    for dtype in TYPES:
        tensors = factors(9, 12, 70, 4, bias=True, dtype=dtype)
        x, weight, bias, a, b = (None if tensor is None else tensor.detach() for tensor in tensors.values())
        strided, ids, factor, mask = x.t().contiguous().t(), torch.randint(-1, 2, (9,)), torch.rand(70), Dropout.of(0.3, SEED, 0, 0, 12)
        for some in ((None, None, 1), (factor, ids, 2)):
            torch.library.opcheck(ops.lora_linear.default, (strided, weight, bias, a, b, *some, SCALE, list(mask)))
            for wanted in (True, False):
                grad = torch.randn(9, 70).to(dtype)
                torch.library.opcheck(ops.lora_linear_grad_input.default, (grad, weight, a, b, *some, SCALE, list(mask), wanted))
            low = torch.randn(9, 4).to(dtype)
            torch.library.opcheck(ops.lora_linear_grad_factors.default, (grad, strided, low, low, some[0], grad, list(mask)))
        torch.library.opcheck(ops.lora_dropout.default, (strided, list(mask)))
        assert ops.lora_linear(x, weight, bias, a, b, None, None, 1, SCALE, mask)[2].shape == (0, 70)


@needs_kernels
def test_under_torch_compile() -> None:
    tensors = {**factors(20, 36, 48, 4, bias=True, dtype=torch.float32), "factor": torch.rand(48).requires_grad_()}

    def layer(x: Tensor) -> Tensor:
        return torch.tanh(lora_linear(**{**tensors, "x": x}, scale=SCALE, seed=SEED, dropout_p=0.4))

    expected, found = layer(tensors["x"]), torch.compile(layer, backend="aot_eager", fullgraph=True)(tensors["x"])
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, tensors).values(), gradients(expected, tensors).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_parts_of_a_fused_layer() -> None:
    """Adapters of q, k and v, of ranks of their own, one of them missing: as three layers."""
    generator = torch.Generator().manual_seed(4)
    sizes, ranks = (10, 4, 6), (2, 0, 3)
    tensors = factors(15, 12, 20, 2, bias=True)
    pairs: list[Any] = [
        tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((r, 12), (size, r))) if r else None
        for size, r in zip(sizes, ranks)
    ]
    a, b = stack_targets(pairs, sizes)
    assert (a.shape, b.shape) == ((5, 12), (20, 5))
    found = lora_linear(tensors["x"], tensors["weight"], tensors["bias"], a, b, scale=SCALE, dropout_p=0.3, seed=SEED)
    kept = tensors["x"] * keep_mask((15, 12), (0, 12), 0.3, SEED, tensors["x"])
    parts = [SCALE * (kept @ pair[0].t()) @ pair[1].t() if pair else torch.zeros(15, size) for pair, size in zip(pairs, sizes)]
    expected = tensors["x"] @ tensors["weight"].t() + tensors["bias"] + torch.cat(parts, 1)
    torch.testing.assert_close(found, expected)
    wanted = [tensors["x"], *pairs[0], *pairs[2]]
    upstream = torch.randn(15, 20, generator=generator, dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream)):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"pairs: got B \(10, 2\) for part 0, wanted \[9, 2\]"):
        stack_targets(pairs, (9, 4, 6))


@needs_kernels
def test_wrong_arguments_are_named() -> None:
    tensors = factors(6, 8, 10, 2, bias=True, dtype=torch.float32)
    x, weight, bias, a, b = (tensors[name] for name in ("x", "weight", "bias", "lora_a", "lora_b"))
    none, op = [0, 0, 0, 0, 0], torch.ops.mswift.lora_linear
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("x: got", (x[:, :7], weight, bias, a, b, None, None, 1, 1.0, none)),
        ("x: got Double", (x.double(), weight, bias, a, b, None, None, 1, 1.0, none)),
        ("weight: got 1", (x, weight[0], bias, a, b, None, None, 1, 1.0, none)),
        ("bias: wanted", (x, weight, bias[:3], a, b, None, None, 1, 1.0, none)),
        ("a: got", (x, weight, bias, a[:, :3], b, None, None, 1, 1.0, none)),
        ("b: got", (x, weight, bias, a, b[:, :1], None, None, 1, 1.0, none)),
        ("factor: wanted", (x, weight, bias, a, b, torch.ones(3), None, 1, 1.0, none)),
        ("ids: wanted", (x, weight, bias, a, b, None, torch.zeros(2, dtype=torch.int64), 1, 1.0, none)),
        ("adapters: got 3", (x, weight, bias, a, b, None, None, 3, 1.0, none)),
        ("dropout: wanted", (x, weight, bias, a, b, None, None, 1, 1.0, [1, 2])),
    ]
    for message, args in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*args)
    with pytest.raises(ValueError, match=r"dropout_p: got 1\.0"):
        lora_linear(**tensors, scale=1.0, dropout_p=1.0)
    with pytest.raises(ValueError, match=r"adapter_ids: got int64 \[2\], wanted int64 \[6\]"):
        lora_linear(**{**tensors, "lora_a": a[None], "lora_b": b[None]}, scale=1.0, adapter_ids=torch.zeros(2, dtype=torch.int64))
    odd = torch.zeros(2, 7, dtype=torch.bfloat16)
    assert "even sizes" in str(choice.hindrance(NAME, odd, odd, odd, odd)) or not CAN_BF16
    assert choice.hindrance(NAME, *(tensor.half() for tensor in (x, weight, a, b))) == "no kernel for torch.float16"


@needs_kernels
def test_the_code_for_avx2_as_well() -> None:
    assert passed_with("avx2", __file__, "fp64 or same_mask or threads") > 3


@needs_kernels
def test_autocast_where_neither_torch_nor_the_kernels_have_bf16() -> None:
    """Products are widened there; autocast must not narrow one of their operands again."""
    assert passed_with("avx2", __file__, "recomputation_and_autocast", torch_too=True) == 2
    assert passed_with("avx2", str(Path(__file__).with_name("test_quantised_linear.py")), "autocast", torch_too=True) == 1


# ---- several ranks -------------------------------------------------------------------------------------------------------------------

SIZES = {"tokens": 12, "into": 16, "out": 24, "rank": 2}
DROPOUT = 0.4


def _whole(dtype: torch.dtype, dora: bool) -> dict[str, Any]:
    tensors = factors(**SIZES, bias=False, dtype=dtype)
    return {**tensors, "factor": torch.linspace(0.5, 1.5, SIZES["out"], dtype=dtype).requires_grad_() if dora else None}


def _parallel(rank: int, world: int, kind: str, dtype: torch.dtype, dora: bool) -> dict[str, Tensor]:
    import torch.distributed as dist

    tensors, group = _whole(dtype, dora), dist.group.WORLD
    cut = {"row": {"x": 1, "weight": 1, "lora_a": 1}}.get(kind, {"weight": 0, "lora_b": 0, "factor": 0})
    for name, dim in {**cut, **({"x": 0} if kind == "sequence" else {})}.items():
        if tensors[name] is not None:
            needed = tensors[name].requires_grad
            tensors[name] = tensors[name].detach().chunk(world, dim)[rank].contiguous().requires_grad_(needed)
    common = {"scale": SCALE, "dropout_p": DROPOUT, "seed": SEED}
    if kind == "row":
        part = SIZES["into"] // world
        output = lora_linear(**tensors, **common, first_column=rank * part, full_width=SIZES["into"])
        return {"output": output.detach(), **gradients(output, tensors)}
    output = lora_linear(**tensors, **common, group=group, sequence_parallel=kind == "sequence")
    upstream = pull(SIZES["tokens"], SIZES["out"]).to(dtype).chunk(world, 1)[rank]
    names = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    return {"output": output.detach(), **dict(zip(names, torch.autograd.grad(output, [tensors[name] for name in names], upstream)))}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["column", "row", "sequence"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_column_row_and_sequence_parallel(kind: str, world: int, dora: bool, dtype: torch.dtype) -> None:
    ranks = run_distributed(_parallel, world, kind, dtype, dora)
    truth = exact(_whole(dtype, dora), dropout_p=DROPOUT)
    dims = {"column": {"output": 1, "lora_b": 0, "factor": 0}, "row": {"x": 1, "lora_a": 1}}
    dims["sequence"] = {**dims["column"], "x": 0}
    partial = {"row": {"output", "lora_b", "factor"}}.get(kind, {"lora_a"})
    for name, expected in truth.items():
        parts = [found[name] for found in ranks]
        if name in dims[kind]:
            whole = torch.cat(parts, dims[kind][name])
        elif name in partial:
            whole = torch.stack(parts).sum(0)
        else:
            whole = parts[0]
            assert all(torch.equal(part, whole) for part in parts), "it was summed over the ranks"
        torch.testing.assert_close(whole.double(), expected, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}))
