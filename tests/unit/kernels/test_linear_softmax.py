"""The two operators beneath the loss: the compiled ones against plain torch in fp64, the references against the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels import linear_softmax as module
from mswift.kernels.linear_softmax import NAME, Limits, keeping_statistics, keeps, kept_weight_gradient, statistics, weight_gradient
from tests.unit.kernels.isa import passed_with

CAN_BF16 = extension.available() and extension.isa() in ("avx512_bf16", "amx")
needs_kernels = pytest.mark.skipif(not extension.available(), reason="the compiled kernels are not built")


@pytest.fixture(params=["reference", "compiled"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    before = choice.selected()
    if request.param == "compiled" and not extension.available():
        pytest.skip("the compiled kernels are not built")
    choice.select("reference" if request.param == "reference" else NAME)
    yield request.param
    choice.select(before)


def operands(tokens: int, width: int, rows: int, dtype: torch.dtype, bias: bool, seed: int = 0, scale: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(tokens, width, generator=generator) * scale).to(dtype)
    weight = torch.randn(rows, width, generator=generator).div(width**0.5).to(dtype)
    labels = torch.randint(-1, rows, (tokens,), generator=generator)
    return hidden, weight, torch.randn(rows, generator=generator).to(dtype) if bias else None, labels


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, limits: Limits) -> dict[str, Tensor]:
    """In fp64: logits and slopes, and without the labels' places: log-sum-exp, mean distance from it, averaged rows (both ways)."""
    hidden, weight = hidden.double(), weight.double()[: limits.valid]
    logits = hidden @ weight.t()
    logits = (logits if bias is None else logits + bias.double()[: limits.valid]) * limits.scale
    slope = torch.ones_like(logits)
    if limits.cap:
        slope = 1 - torch.tanh(logits / limits.cap) ** 2
        logits = torch.tanh(logits / limits.cap) * limits.cap
    here = (
        torch.nn.functional.one_hot(labels.clamp(min=0), max(limits.valid, int(labels.max()) + 1))[:, : limits.valid].bool() & (labels >= 0)[:, None]
    )
    rest = logits.masked_fill(here, -torch.inf)
    lse = rest.logsumexp(-1)
    p = (rest - lse[:, None]).exp()
    distance = rest.masked_fill(here, 0.0) - lse[:, None]
    return {
        "lse": lse,
        "distance": (p * distance).sum(-1),
        "label": torch.where(here.any(-1), (logits * here).sum(-1), -torch.inf),
        "mean": (p * slope) @ weight,
        "mean2": (p * slope * distance) @ weight,
        "logits": logits,
        "slope": slope,
        "here": here,
    }


def compare(operand: Any, limits: Limits, tolerance: float) -> None:
    truth = exact(*operand, limits)
    found = statistics(*operand, limits, 2)
    lse = found.reference.double() + found.others.double().log()
    torch.testing.assert_close(lse, truth["lse"], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.label.double(), truth["label"], atol=tolerance, rtol=tolerance)
    if not bool(truth["lse"].isfinite().all()):
        return  # the label is all there is
    shift = found.reference.double() - lse
    torch.testing.assert_close(found.spread.double() / found.others.double() + shift, truth["distance"], atol=tolerance, rtol=tolerance)
    mean = found.mean.double() / found.others.double()[:, None]
    torch.testing.assert_close(mean, truth["mean"], atol=tolerance, rtol=tolerance)
    mean2 = found.mean2.double() / found.others.double()[:, None] + shift[:, None] * mean
    torch.testing.assert_close(mean2, truth["mean2"], atol=4 * tolerance, rtol=4 * tolerance)


def compare_weight_gradient(operand: Any, limits: Limits, tolerance: float) -> None:
    hidden, weight, bias, labels = operand
    truth = exact(*operand, limits)
    lse = truth["logits"].logsumexp(-1)
    a, b, g = torch.randn(3, len(labels), generator=torch.Generator().manual_seed(5)).double()
    p = (truth["logits"] - lse[:, None]).exp()
    gradient = (p * (a[:, None] - b[:, None] * truth["logits"]) + truth["here"] * g[:, None]) * truth["slope"] * limits.scale
    expected = torch.zeros_like(weight, dtype=torch.float64)
    expected[: limits.valid] = gradient.t() @ hidden.double()
    found, found_bias = weight_gradient(*operand, torch.stack((lse, a, b, g)).float(), limits)
    assert found.dtype == weight.dtype
    assert found[limits.valid :].count_nonzero() == 0
    torch.testing.assert_close(found.double(), expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=tolerance)
    assert found_bias.shape == ((0,) if bias is None else bias.shape)
    if bias is not None:
        torch.testing.assert_close(found_bias[: limits.valid].double(), gradient.sum(0), atol=20 * tolerance, rtol=tolerance)
        assert found_bias[limits.valid :].count_nonzero() == 0


def kept_gradients(operand: Any, limits: Limits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of weight and bias for a random gradient of each label's log-probability: through kept logits; truth in fp64 of both."""
    hidden, weight, _, labels = operand
    truth = exact(*operand, limits)
    assert keeps(hidden, weight, limits)
    found, kept = keeping_statistics(*operand, limits, True)
    plain = statistics(*operand, limits, 1)
    assert all(torch.equal(one, other) for one, other in zip(found[:5], plain[:5])), "keeping changes the statistics"
    lse = torch.logaddexp(found.reference.double() + found.others.double().log(), found.label.double())
    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(5)).double()
    at_label = upstream * torch.where(truth["here"].any(-1), 1 - (found.label.double() - lse).exp(), 0.0)
    address = kept.memory.data_ptr()
    mine, mine_bias = kept_weight_gradient(*operand, torch.stack((lse, -upstream, upstream, at_label)).float(), kept, limits)
    assert mine.data_ptr() == address
    assert mine.dtype == weight.dtype
    assert mine[limits.valid :].count_nonzero() == 0
    gradient = (truth["here"].double() - (truth["logits"] - truth["logits"].logsumexp(-1, keepdim=True)).exp()) * upstream[:, None] * limits.scale
    expected = torch.zeros_like(weight, dtype=torch.float64)
    expected[: limits.valid] = gradient.t() @ hidden.double()
    return mine, mine_bias, expected, gradient.sum(0)


def compare_kept(operand: Any, limits: Limits, tolerance: float, panels: int) -> None:
    """With room for the logits of so many times 64 tokens besides the gradient's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROOM", panels * 64 * operand[1][:, 0].nbytes)
        mine, mine_bias, expected, expected_bias = kept_gradients(operand, limits)
    torch.testing.assert_close(mine.double(), expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=tolerance)
    if operand[2] is not None:
        torch.testing.assert_close(mine_bias[: limits.valid].double(), expected_bias, atol=20 * tolerance, rtol=tolerance)
        assert mine_bias[limits.valid :].count_nonzero() == 0


sizes = {
    "tokens": st.integers(1, 140),
    "width": st.sampled_from([2, 6, 30, 64, 66, 130]),
    "rows": st.sampled_from([1, 2, 15, 16, 63, 64, 65, 511, 512, 513, 700]),
    "padding": st.sampled_from([0, 1, 30]),
    "bias": st.booleans(),
    "limits": st.sampled_from([(1.0, 0.0), (0.5, 0.0), (1.0, 3.0), (1.7, 5.0)]),
    "seed": st.integers(0, 100),
}


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_compiled_fp32(tokens: int, width: int, rows: int, padding: int, bias: bool, limits: tuple[float, float], seed: int) -> None:
    operand = operands(tokens, width, rows + padding, torch.float32, bias, seed)
    assert choice.compiled(NAME, *operand[:2])
    compare(operand, Limits(rows, *limits), 1e-5)
    compare_weight_gradient(operand, Limits(rows, *limits), 1e-5)


@pytest.mark.skipif(not CAN_BF16, reason="no AVX512-BF16 here")
@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_compiled_bf16(tokens: int, width: int, rows: int, padding: int, bias: bool, limits: tuple[float, float], seed: int) -> None:
    """Statistics are those of the exact products; averages have the rounding of the probabilities and no more."""
    operand = operands(tokens, width, rows + padding, torch.bfloat16, bias, seed)
    assert choice.compiled(NAME, *operand[:2])
    truth = exact(*operand, Limits(rows, *limits))
    found = statistics(*operand, Limits(rows, *limits), 1)
    torch.testing.assert_close(found.reference.double() + found.others.double().log(), truth["lse"], atol=1e-5, rtol=1e-5)
    compare(operand, Limits(rows, *limits), 2e-2)
    compare_weight_gradient(operand, Limits(rows, *limits), 2e-2)


kept_sizes = {
    "tokens": st.integers(1, 300),
    "width": st.sampled_from([2, 62, 64, 66, 130, 192, 400]),  # of no token the logits are kept, of some, of all
    "rows": st.sampled_from([1, 2, 63, 64, 65, 511, 512, 513, 700, 1100]),
    "padding": st.sampled_from([0, 1, 30]),
    "bias": st.booleans(),
    "scale": st.sampled_from([1.0, 0.5, 1.7]),
    "panels": st.sampled_from([0, 1, 2, 5]),
    "seed": st.integers(0, 100),
}


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(**kept_sizes)
def test_kept_logits_fp32(tokens: int, width: int, rows: int, padding: int, bias: bool, scale: float, panels: int, seed: int) -> None:
    compare_kept(operands(tokens, width, rows + padding, torch.float32, bias, seed), Limits(rows, scale, 0.0), 1e-5, panels)


@pytest.mark.skipif(not CAN_BF16, reason="no AVX512-BF16 here")
@settings(max_examples=60, deadline=None)
@given(**kept_sizes)
def test_kept_logits_bf16(tokens: int, width: int, rows: int, padding: int, bias: bool, scale: float, panels: int, seed: int) -> None:
    compare_kept(operands(tokens, width, rows + padding, torch.bfloat16, bias, seed), Limits(rows, scale, 0.0), 2e-2, panels)


@pytest.mark.skipif(not CAN_BF16, reason="no AVX512-BF16 here")
@pytest.mark.parametrize("logits", [1e-3, 1.0, 6.0])
def test_kept_logits_are_as_good_as_computed_ones(logits: float) -> None:
    """What is kept of a logit in 16 bits may cost a twentieth of the error that probabilities in bf16 have anyway."""
    operand, limits = operands(256, 256, 3000, torch.bfloat16, False, scale=logits), Limits(3000, 1.0, 0.0)
    mine, _, expected, _ = kept_gradients(operand, limits)
    truth = exact(*operand, limits)
    upstream = torch.randn(256, generator=torch.Generator().manual_seed(5))
    factors = torch.stack((truth["logits"].logsumexp(-1).float(), -upstream, torch.zeros(256), upstream * truth["here"].any(-1)))
    computed, _ = weight_gradient(*operand, factors, limits)
    errors = [(part.double() - expected).norm().item() for part in (mine, computed)]
    assert 0 < errors[0] <= 1.05 * errors[1]
    assert errors[0] < 3e-3 * expected.norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not CAN_BF16, reason="no AVX512-BF16 here"))])
@pytest.mark.parametrize("scale", [1.0, 300.0, 20000.0])
@pytest.mark.parametrize("rising", [True, False])
@needs_kernels
def test_kept_logits_of_any_range(dtype: torch.dtype, scale: float, rising: bool) -> None:
    """With references that move from block to block, by far more than what 16 bits hold; a label is in every block."""
    hidden, weight, _, labels = operands(70, 64, 3000, dtype, False)
    order = (weight @ hidden[0]).argsort(descending=not rising)
    hidden[1:] = hidden[:1] * torch.linspace(0.2, 1.2, 69)[:, None].to(dtype)
    operand = ((hidden * scale).to(dtype), weight[order].contiguous(), None, labels)
    mine, _, expected, _ = kept_gradients(operand, Limits(3000, 1.0, 0.0))
    assert bool(mine.isfinite().all())
    ulp = 3e-7 * (operand[0].double() @ operand[1].double().t()).abs().max().item()  # of the products: a relative error of each probability
    tolerance = (1e-5 if dtype == torch.float32 else 5e-3) + ulp
    torch.testing.assert_close(mine.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


def test_both_against_fp64(implementation: str) -> None:
    for limits in (Limits(90, 1.0, 0.0), Limits(77, 0.7, 4.0), Limits(1, 1.0, 0.0)):
        operand = operands(37, 24, 90, torch.float32, True)
        assert choice.compiled(NAME, *operand[:2]) == (implementation == "compiled")
        compare(operand, limits, 1e-5)
        compare_weight_gradient(operand, limits, 1e-5)


@pytest.mark.parametrize("scale", [1.0, 300.0, 20000.0])
@pytest.mark.parametrize("rising", [True, False])
def test_any_range_of_logits(implementation: str, scale: float, rising: bool) -> None:
    """Rows sorted so that every block's largest logit exceeds the last one's, or the reverse."""
    hidden, weight, _, labels = operands(9, 16, 2000, torch.float32, False)
    order = (weight @ hidden[0]).argsort(descending=not rising)
    operand = (hidden * scale, weight[order].contiguous(), None, labels)
    truth = exact(*operand, Limits(2000, 1.0, 0.0))
    found = statistics(*operand, Limits(2000, 1.0, 0.0), 2)
    assert all(bool(part.isfinite().all()) for part in (found.others, found.spread, found.mean, found.mean2))
    ulp = 1e-6 * truth["logits"].abs().max().item()  # of the products, which are rounded to fp32
    torch.testing.assert_close(found.reference.double() + found.others.double().log(), truth["lse"], atol=1e-5 + ulp, rtol=0)
    torch.testing.assert_close(found.mean.double() / found.others.double()[:, None], truth["mean"], atol=1e-5 + 4 * ulp, rtol=1e-4)


@pytest.mark.parametrize("b", [0.0, 0.3])
def test_rows_with_a_bias_of_minus_infinity(implementation: str, b: float) -> None:
    """Banned tokens: no probability, and finite gradients that are zero there."""
    for dtype in (torch.float32, *([torch.bfloat16] if CAN_BF16 else [])):
        hidden, weight, bias, labels = operands(37, 24, 90, dtype, True)
        bias[7:40] = -torch.inf
        labels = torch.where((labels >= 7) & (labels < 40), 5, labels)
        factors = torch.stack((torch.full((37,), 4.0), torch.ones(37), torch.full((37,), b), torch.ones(37)))
        found = statistics(hidden, weight, bias, labels, Limits(90, 1.0, 0.0), 2)
        assert all(bool(part.isfinite().all()) for part in (found.others, found.spread, found.mean, found.mean2))
        grad_weight, grad_bias = weight_gradient(hidden, weight, bias, labels, factors, Limits(90, 1.0, 0.0))
        rest = torch.cat((torch.arange(7), torch.arange(40, 90)))
        short = torch.where(labels >= 40, labels - 33, labels)
        expected, expected_bias = weight_gradient(hidden, weight[rest], bias[rest], short, factors, Limits(57, 1.0, 0.0))
        assert grad_weight[7:40].count_nonzero() == 0
        assert grad_bias[7:40].count_nonzero() == 0
        torch.testing.assert_close(grad_weight[rest], expected)
        torch.testing.assert_close(grad_bias[rest], expected_bias)


def test_nothing_to_do(implementation: str) -> None:
    hidden, weight, _, labels = operands(3, 8, 20, torch.float32, False)
    none = statistics(hidden[:0], weight, None, labels[:0], Limits(20, 1.0, 0.0), 2)
    assert none.others.shape == (0,)
    assert none.mean.shape == none.mean2.shape == (0, 8)
    padding = statistics(hidden, weight, None, labels.fill_(-1), Limits(0, 1.0, 0.0), 1)
    assert padding.others.tolist() == [0.0] * 3
    assert padding.label.tolist() == [float("-inf")] * 3
    assert padding.mean.count_nonzero() == 0
    gradient, bias = weight_gradient(hidden[:0], weight, None, labels[:0], torch.zeros(4, 0), Limits(20, 1.0, 0.0))
    assert gradient.shape == weight.shape
    assert gradient.count_nonzero() == 0
    assert bias.numel() == 0


def test_a_nan_is_passed_on(implementation: str) -> None:
    hidden, weight, _, labels = operands(70, 8, 600, torch.float32, False)
    hidden[66, 3] = torch.nan
    found = statistics(hidden, weight, None, labels, Limits(600, 1.0, 0.0), 1)
    assert found.others.isnan().nonzero().tolist() == [[66]]
    assert found.mean.isnan().any(-1).nonzero().tolist() == [[66]]


@needs_kernels
@pytest.mark.parametrize(("tokens", "panels"), [(150, 0), (63, 0), (259, 0), (259, 1), (300, 9)])
def test_the_same_bits_of_kept_logits_for_any_number_of_threads(tokens: int, panels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads cut the tokens elsewhere than the memory does."""
    monkeypatch.setattr(module, "_ROOM", panels * 64 * 1100 * (2 if CAN_BF16 else 4))
    operand, limits = operands(tokens, 192, 1100, torch.bfloat16 if CAN_BF16 else torch.float32, True), Limits(1090, 1.0, 0.0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        stats, kept = keeping_statistics(*operand, limits, False)
        assert stats.mean.numel() == 0
        results.append(kept_weight_gradient(*operand, torch.ones(4, tokens), kept, limits))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result))
    assert results[0][0][:1090].count_nonzero() > 0


@needs_kernels
def test_nothing_to_keep() -> None:
    hidden, weight, _, labels = operands(3, 64, 20, torch.float32, False)
    for count, valid in ((0, 20), (3, 0)):
        limits = Limits(valid, 1.0, 0.0)
        stats, kept = keeping_statistics(hidden[:count], weight, None, labels[:count].fill_(-1), limits, True)
        assert stats.others.tolist() == [0.0] * count
        gradient, _ = kept_weight_gradient(hidden[:count], weight, None, labels[:count], torch.zeros(4, count), kept, limits)
        assert gradient.shape == weight.shape
        assert gradient.count_nonzero() == 0


@needs_kernels
def test_the_same_bits_for_any_number_of_threads() -> None:
    operand = operands(150, 64, 1100, torch.bfloat16 if CAN_BF16 else torch.float32, True)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([*statistics(*operand, Limits(1090, 1.0, 0.0), 2), *weight_gradient(*operand, torch.ones(4, 150), Limits(1090, 1.0, 0.0))])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result))
    assert results[0][4].count_nonzero() > 0


@needs_kernels
def test_the_code_for_avx2_as_well() -> None:
    assert passed_with("avx2", __file__, "fp32 or both_against or any_range or nan") > 16
    assert extension.isa() not in ("avx512_bf16", "amx") or passed_with("avx512", __file__, "fp32") == 2


@pytest.mark.skipif(not CAN_BF16, reason="AVX-512 is what the other tests run, or more than there is")
def test_the_code_for_avx512_as_well() -> None:
    assert passed_with("avx512", __file__, "fp32 or both_against or any_range or nan") > 10


@needs_kernels
def test_opcheck() -> None:
    for dtype in [torch.float32, *([torch.bfloat16] if CAN_BF16 else [])]:
        hidden, weight, bias, labels = operands(9, 12, 70, dtype, True)
        strided = hidden.t().contiguous().t()
        assert not strided.is_contiguous()
        assert torch.equal(
            torch.ops.mswift.linear_softmax(strided, weight, bias, labels, 70, 1.0, 0.0, 1)[1],
            torch.ops.mswift.linear_softmax(hidden, weight, bias, labels, 70, 1.0, 0.0, 1)[1],
        )
        for gradient in (0, 1, 2):
            torch.library.opcheck(torch.ops.mswift.linear_softmax.default, (strided, weight, bias, labels, 68, 1.0, 0.0, gradient))
        factors = torch.ones(4, 9)
        for some in (bias, None):
            torch.library.opcheck(torch.ops.mswift.linear_softmax_grad_weight.default, (hidden, weight, some, labels, factors, 68, 1.0, 4.0))


@needs_kernels
def test_opcheck_of_kept_logits() -> None:
    for dtype in [torch.float32, *([torch.bfloat16] if CAN_BF16 else [])]:
        two = 2 * 64 * 70 * dtype.itemsize
        for tokens, some, room in ((64, True, 0), (64, False, 0), (192, True, two)):  # they fill all memory: what they do not is undefined
            hidden, weight, bias, labels = operands(tokens, 64, 70, dtype, some)
            args = (hidden.t().contiguous().t(), weight, bias, labels, 70, 1.5, some, room)
            torch.library.opcheck(torch.ops.mswift.linear_softmax_keeping.default, args)
            _, _, kept, more, references = torch.ops.mswift.linear_softmax_keeping(*args)
            assert more.shape == (70, tokens - 64)
            operand = (hidden, weight, bias, labels, torch.ones(4, tokens), kept, more, references, 70, 1.5)
            torch.library.opcheck(torch.ops.mswift.linear_softmax_grad_weight_kept.default, operand)
    with pytest.raises(RuntimeError, match="kept: wanted what"):
        torch.ops.mswift.linear_softmax_grad_weight_kept(*operand[:5], kept[:3], *operand[6:])
    with pytest.raises(RuntimeError, match="references: wanted"):
        torch.ops.mswift.linear_softmax_grad_weight_kept(*operand[:7], references[:, :3], *operand[8:])
    with pytest.raises(RuntimeError, match="more: wanted"):
        torch.ops.mswift.linear_softmax_grad_weight_kept(*operand[:6], more[:, :3], *operand[7:])


@needs_kernels
def test_arguments_are_named_in_errors() -> None:
    hidden, weight, bias, labels = operands(4, 6, 10, torch.float32, True)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("hidden: got 1 dimensions", (hidden[0], weight, bias, labels, 10)),
        ("weight: got", (hidden, weight[:, :5], bias, labels, 10)),
        ("weight: got Double", (hidden, weight.double(), bias, labels, 10)),
        ("labels: wanted int64", (hidden, weight, bias, labels.int(), 10)),
        ("valid: got 11", (hidden, weight, bias, labels, 11)),
        ("bias: wanted", (hidden, weight, bias[:3], labels, 10)),
        ("hidden: got Half", (hidden.half(), weight.half(), bias, labels, 10)),
    ]
    for message, args in wrong:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.mswift.linear_softmax(*args, 1.0, 0.0, 1)
    with pytest.raises(RuntimeError, match="factors: wanted"):
        torch.ops.mswift.linear_softmax_grad_weight(hidden, weight, bias, labels, torch.ones(3, 4), 10, 1.0, 0.0)
    odd = torch.zeros(2, 7, dtype=torch.bfloat16)
    assert choice.hindrance(NAME, odd, odd) is not None
    assert choice.hindrance(NAME, odd.half(), odd.half()) == "no kernel for torch.float16"
