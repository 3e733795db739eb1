"""Operators whose kernels are those of csrc/cuda: dispatch, autograd and checks as on a device, the kernels on the execution model of csrc/emu."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.kernels import choice, cuda, cuda_grouped, cuda_operators, extension
from mswift.kernels.elementwise import GELU_TANH, SILU, Gate, add_rms_norm, gated_activation, rms_norm, rotate, rotate_
from mswift.kernels.grouped_linear import grouped_linear, lora_grouped_linear
from mswift.kernels.linear_log_probs import linear_log_probs
from mswift.kernels.lora_linear import lora_linear
from mswift.kernels.permute import permute, unpermute
from mswift.kernels.quantised_linear import QuantisedWeight, quantise_int8, quantise_nf4, quantised_linear
from tests.unit.kernels.emulated import Emulated, on_cpu, relative

pytestmark = pytest.mark.skipif(not extension.isa_at_least("avx2"), reason="the operators are not built, or their faces would not take them here")
BF16 = torch.bfloat16
LIMITS = {torch.float32: 3e-6, BF16: 4e-3}


@pytest.fixture(scope="module")
def library() -> Emulated:
    return Emulated()


@pytest.fixture
def emulated(library: Emulated) -> Iterator[Emulated]:
    before = choice.selected()
    choice.select("auto")
    with on_cpu(library):
        yield library
    choice.select(before)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table_of(tokens: int, half: int) -> Tensor:
    angles = draw(tokens, half, seed=5)
    return torch.stack((angles.cos(), angles.sin()))


def both(function: Callable[..., Tensor], inputs: list[Tensor], library: Emulated, kernels: int, limit: float) -> None:
    """Values and gradients of the kernels beside those of the reference, and that the kernels are what ran."""
    inputs = [part.detach().requires_grad_() for part in inputs]
    found = {}
    for setting in ("auto", "reference"):
        before = library.launches()
        choice.select(setting)
        out = function(*inputs)
        pull = draw(*out.shape, seed=9, dtype=out.dtype)
        found[setting] = (out.detach(), *torch.autograd.grad(out, inputs, pull))
        assert library.launches() - before == (kernels if setting == "auto" else 0)
    for mine, other in zip(found["auto"], found["reference"], strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert relative(mine, other) < limit


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_norms_gates_and_rotations(emulated: Emulated, dtype: torch.dtype) -> None:
    """The backward launch of a norm gives the weight's parts, another one adds them up."""
    x, weight = draw(3, 2, 24, dtype=dtype), draw(24, seed=1, dtype=dtype)
    both(lambda x: rms_norm(x, weight, 1e-3), [x], emulated, 2, LIMITS[dtype])
    for zero_centred in (False, True):
        both(partial(rms_norm, eps=1e-3, zero_centred=zero_centred), [x, weight], emulated, 3, LIMITS[dtype])
    both(lambda x, w: rms_norm(x.transpose(0, 1), w, 1e-3), [x, weight], emulated, 3, LIMITS[dtype])
    both(lambda x, r, w: torch.stack(add_rms_norm(x, r, w, 1e-3)), [x, draw(3, 2, 24, seed=4, dtype=dtype), weight], emulated, 3, LIMITS[dtype])
    both(lambda x, r, w: add_rms_norm(x, r, w, 1e-3)[0], [x, draw(3, 2, 24, seed=4, dtype=dtype), weight], emulated, 3, LIMITS[dtype])
    for gate in (SILU, GELU_TANH, Gate(slope=1.702, limit=1.0, offset=1.0)):
        both(partial(gated_activation, gate=gate), [2 * x], emulated, 2, LIMITS[dtype])
    fused = draw(5, 2, 3, 40, dtype=dtype)  # queries straight out of a fused projection, of a batch of two
    for interleaved, half in ((False, 8), (True, 3)):
        table = table_of(5, half)
        both(lambda q: rotate(q[..., 8:32], table, interleaved=interleaved), [fused], emulated, 2, LIMITS[dtype])  # noqa: B023
        for turn in (
            lambda q: rotate_(q.clone(), table, width=40, each=3, turned=2, interleaved=interleaved),  # noqa: B023
            lambda q: rotate_(q.clone().transpose(0, 1)[:, :4], table[:, :2], width=20, interleaved=interleaved),  # noqa: B023
        ):
            both(turn, [fused], emulated, 2, LIMITS[dtype])
        both(lambda q: rotate(q.transpose(0, 1)[:, :, 1:], table[:, :2], interleaved=interleaved), [fused], emulated, 2, LIMITS[dtype])  # noqa: B023


@pytest.mark.parametrize("width", [32, 648])
def test_the_head(emulated: Emulated, width: int) -> None:
    """Forward, and gradients of hidden states and weight, by single blocks and by groups of six; the entropy's too."""
    assert emulated.ask("mswift_head_on_chip", torch.empty(0), width) == (width == 32)
    hidden, weight, bias = draw(7, width, dtype=BF16), (draw(150, width, seed=1) * (32 / width) ** 0.5).to(BF16), draw(150, seed=2, dtype=BF16)
    labels = torch.tensor([3, -100, 120, 0, 77, 139, 128])
    common = {"bias": bias, "vocab_size": 140, "logit_scale": 0.9, "softcap": 6.0}

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        scores = linear_log_probs(hidden, weight, labels, entropy_grad=True, **common)
        return scores.log_probs + 0.3 * scores.entropy + 0.1 * scores.lse

    inputs = [part.requires_grad_() for part in (hidden, weight)]
    before = emulated.launches()
    mine = value(*inputs)
    grads = torch.autograd.grad(mine.sum(), inputs)
    assert emulated.launches() > before
    choice.select("reference")
    exact = [part.detach().double().requires_grad_() for part in inputs]
    z = 0.9 * (exact[0] @ exact[1].T + bias.double())[:, :140]
    z = 6.0 * torch.tanh(z / 6.0)
    log_p = z.log_softmax(-1)
    scored = labels >= 0
    wanted = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0] - 0.3 * (log_p.exp() * log_p).sum(-1) + 0.1 * z.logsumexp(-1)
    wanted = wanted * scored
    assert relative(mine, wanted) < 1e-5
    for grad, other, reference in zip(grads, torch.autograd.grad(wanted.sum(), exact), torch.autograd.grad(value(*inputs).sum(), inputs)):
        assert relative(grad, other) < 1e-2
        assert relative(grad, other) < max(1.5 * relative(reference, other), 4e-3)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("adapters", [0, 3])
def test_a_linear_layer_with_adapters(emulated: Emulated, dora: bool, adapters: int) -> None:
    """All products of both directions, with a dropped-out input that is some columns of a wider one, against float64."""
    tokens, inside, outside, ranks, scale = 20, 40, 72, 6, 0.5
    x, weight, bias, a, b, grad = (
        draw(*shape, seed=i, dtype=BF16)
        for i, shape in enumerate(((tokens, inside), (outside, inside), (outside,), (ranks, inside), (outside, ranks), (tokens, outside)))
    )
    factor = draw(outside, seed=7).abs() + 0.5 if dora else None
    ids = torch.arange(tokens) % 4 - 1 if adapters else None
    dropout = [64, 77, 5, 8, 8 + inside - 2]
    ops, before = torch.ops.mswift, emulated.launches()
    mask = ops.lora_dropout(torch.ones(tokens, inside), dropout)
    assert mask.unique().tolist() == pytest.approx([0.0, 256 / 192])
    assert not mask[:, -2:].any(), "columns beyond the full width"
    assert torch.equal(ops.lora_dropout(x, dropout), (x.float() * mask).to(BF16))
    assert torch.equal(ops.lora_dropout(x, [0, 1, 0, 0, 99]), x)
    out, low, inner = ops.lora_linear(x, weight, bias, a, b, factor, ids, max(adapters, 1), scale, dropout)
    grad_x, grad_low = ops.lora_linear_grad_input(grad, weight, a, b, factor, ids, max(adapters, 1), scale, dropout, True)
    nothing, again = ops.lora_linear_grad_input(grad, weight, a, b, factor, ids, max(adapters, 1), scale, dropout, False)
    grads = ops.lora_linear_grad_factors(grad, x, low, grad_low, factor, inner, dropout)
    assert emulated.launches() - before == 9 + dora * 2

    wide = [part.double().requires_grad_() for part in (x, a, b)]
    own = torch.ones(tokens, ranks, dtype=torch.float64) if ids is None else (torch.arange(ranks) // 2 == ids[:, None]).double()
    want_low = scale * own * ((wide[0] * mask.double()) @ wide[1].T)
    want_factor = torch.ones(outside, dtype=torch.float64).requires_grad_() if factor is None else factor.double().requires_grad_()
    want_inner = wide[0] @ weight.double().T + want_low @ wide[2].T
    wanted = want_factor * want_inner + bias.double()
    want_x, want_a, want_b, want_scale = torch.autograd.grad(wanted, [*wide, want_factor], grad.double())
    pairs = [(out, wanted), (low, want_low), (grad_x, want_x), (grads[0], want_a), (grads[1], want_b)]
    pairs += [(inner, want_inner), (grads[2], want_scale)] if dora else []
    for mine, other in pairs:
        assert relative(mine, other.detach()) < 6e-3
    assert inner.shape == (tokens if dora else 0, outside)
    assert grads[2].shape == (outside if dora else 0,)
    assert torch.equal(again, grad_low)
    assert nothing.shape == (0, inside)


@pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the face would not take bfloat16 here")
@pytest.mark.parametrize("quantise", [quantise_nf4, quantise_int8])
def test_quantised_weights(emulated: Emulated, quantise: Callable[[Tensor], QuantisedWeight]) -> None:
    weight = quantise(draw(40, 64, seed=3))
    inputs = [draw(*shape, seed=i, dtype=BF16) for i, shape in enumerate(((9, 64), (40,), (6, 64), (40, 6)))]

    def value(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return quantised_linear(x, weight, bias, a, b, scale=0.7, dropout_p=0.25, seed=5)

    both(value, inputs, emulated, 6, 8e-3)  # two forward: down to the ranks, the product; four back: to the ranks, the input, both factors


@pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the face would not take bfloat16 here")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_face_of_a_linear_layer(emulated: Emulated, dropout: float) -> None:
    weight, inputs = (
        draw(40, 24, seed=3, dtype=BF16),
        [draw(*shape, seed=i, dtype=BF16) for i, shape in enumerate(((9, 24), (40,), (6, 24), (40, 6)))],
    )

    def value(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, a, b, scale=0.7, dropout_p=dropout, seed=5)

    both(value, inputs, emulated, 6, 8e-3)  # two forward: down to the ranks, the product; four back: to the ranks, the input, both factors


@pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the face would not take bfloat16 here")
@pytest.mark.parametrize("apart", [False, True])
def test_experts_with_adapters(emulated: Emulated, apart: bool) -> None:
    """All experts of a layer in one call, one of them without rows; weights side by side in one tensor, or by themselves."""
    counts, into, out, rank = torch.tensor([3, 0, 9]), 24, 40, 6
    weights, biases, lora_a, lora_b = (
        draw(3, *shape, seed=i, dtype=BF16) for i, shape in enumerate(((out, into), (out,), (rank, into), (out, rank)))
    )
    frozen = list(weights) if not apart else [weight.clone() for weight in weights]
    seeds, common = torch.tensor([5, 6, 2**40]), {"scale": 0.7, "dropout_p": 0.25, "first_column": 4, "full_width": into + 2}

    def value(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_grouped_linear(x, frozen, counts, bias, a, b, seeds=seeds, **common)

    both(value, [draw(12, into, seed=8, dtype=BF16), biases, lora_a, lora_b], emulated, 6, 8e-3)
    both(lambda x, w: grouped_linear(x, w, counts), [draw(12, into, seed=8, dtype=BF16), weights], emulated, 3, 8e-3)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_tokens_to_their_experts_and_back(emulated: Emulated, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice._operators, "permute", dataclasses.replace(choice._operators["permute"], fits=lambda *_: None))
    x, y, weights = draw(5, 20, dtype=dtype), draw(11, 20, dtype=dtype), draw(5, 2, seed=3).abs()
    places = torch.tensor([[3, 1], [9, -1], [0, 4], [10, 2], [-1, -1]])
    both(lambda x: permute(x, places, 11), [x], emulated, 2, LIMITS[dtype])
    both(lambda y: unpermute(y, places), [y], emulated, 2, LIMITS[dtype])
    both(lambda y, w: unpermute(y, places, w), [y, weights], emulated, 2, LIMITS[dtype])
    moved = permute(x, places, 11)
    assert torch.equal(moved[places[places >= 0]], x.repeat_interleave(2, 0)[(places >= 0).reshape(-1)])
    assert not moved[[5, 6, 7, 8]].any()
    wanted = (x.double() * torch.tensor([2, 1, 2, 2, 0])[:, None]).to(dtype)
    assert torch.equal(unpermute(moved, places), wanted)
    for call, message in (
        (lambda: permute(x, places[:4], 11), "places: got int64 .4, 2., wanted .5, 2."),
        (lambda: permute(x[0], places, 11), "x: got"),
        (lambda: unpermute(y, places.int()), "places: got"),
        (lambda: unpermute(y, places, weights[:2]), "weights: got"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_kernels_do_not_take_is_refused_by_name(emulated: Emulated) -> None:
    x = draw(3, 1, 2, 8)
    ops = torch.ops.mswift
    for call, message in (
        (lambda: ops.rms_norm(x, x[0, 0, 0, :4], 1e-5, False), "weight must be"),
        (lambda: ops.lora_dropout(x[0, 0], [256, 0, 0, 0, 8]), "dropout: got"),
        (lambda: ops.lora_dropout(x[0, 0], [1]), "dropout: got"),
        (lambda: ops.lora_linear(x[0, 0], x[0, 0], None, x[0, 0], x[0, 0], None, None, 1, 1.0, [0] * 5), "wanted weight"),
        (lambda: ops.lora_linear(x[0, 0], x[0, 0], None, x[0, 0], x[0, 0, :, :2], None, None, 1, 1.0, [0] * 5), "wanted bfloat16"),
        (lambda: ops.rms_norm(x, x[0, 0, 0].to(BF16), 1e-5, False), "of its dtype"),
        (lambda: ops.gated_activation(x[..., :3], 1.0, 0.0, 1.0, 0.0), "gate and up side by side"),
        (lambda: ops.gated_activation(x, 1.0, 0.0, -1.0, 0.0), "limit must be above 0"),
        (lambda: ops.rotate(x, table_of(2, 4), False, False), "table must be"),
        (lambda: ops.rotate(x[0], table_of(1, 4), False, False), "x must be"),
        (lambda: ops.linear_softmax(x[0, 0], x[0, 0], None, torch.zeros(2, dtype=torch.int64), 2, 1.0, 0.0, 0), "bfloat16"),
        (
            lambda: cuda_operators._run("norm", cuda_operators.KERNELS["rms_norm"], lambda: emulated, x, x.to("meta"), 1e-5, False),
            r"norm: got tensors on several devices \(\(3, 1, 2, 8\) on cpu, \(3, 1, 2, 8\) on meta\)",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_operands_that_a_kernel_would_read_beyond_are_refused_by_name(emulated: Emulated) -> None:
    """Shapes, dtypes and ranges of everything that becomes a pointer; no kernel starts."""
    ops, x, weight, a, b = torch.ops.mswift, *(draw(*shape, dtype=BF16) for shape in ((5, 16), (24, 16), (4, 16), (24, 4)))
    grad, low, labels, none = draw(5, 24, dtype=BF16), draw(5, 4, dtype=BF16), torch.zeros(5, dtype=torch.int64), [0] * 5
    nf4, counts, ups = quantise_nf4(weight), torch.tensor([2, 3]), [b, b]
    codes, scales, places = nf4.codes, nf4.magnitudes, torch.tensor([[0, 99]])

    def layer(bias: Tensor | None = None, factor: Tensor | None = None, x: Tensor = x) -> None:
        ops.lora_linear(x, weight, bias, a, b, factor, None, 1, 1.0, none)

    def head(labels: Tensor = labels, bias: Tensor | None = None, valid: int = 24) -> None:
        ops.linear_softmax(x, weight, bias, labels, valid, 1.0, 0.0, 0)

    def quantised(codes: Tensor = codes, scales: Tensor = scales, **rest: Tensor) -> None:
        parts = {"bias": None, "low": None, "up": None, **rest}
        ops.quantised_product(x, codes, scales, 24, 16, 64, *parts.values(), False, none)

    def grouped(
        weights: list[Tensor], counts: Tensor = counts, biases: tuple[Tensor, ...] = (), low: Tensor | None = None, up: Any = (), **mask: Any
    ) -> None:
        drawn = (mask.get("seeds"), mask.get("threshold", 0), 0, 16)
        ops.grouped_product(x, weights, counts, list(biases), low, list(up), False, 1.0, *drawn)

    two = [weight, weight + 1]
    before = emulated.launches()
    for call, message in (
        (lambda: layer(grad[0, :3]), r"bias: got \[3\]"),
        (lambda: layer(torch.zeros(24, dtype=torch.float64)), "bias: got .*float64"),
        (lambda: layer(factor=torch.ones(3)), r"factor: got \[3\]"),
        (lambda: layer(factor=torch.ones(24, dtype=BF16)), "factor: got .*bfloat16"),
        (lambda: ops.lora_linear_grad_input(grad, weight, a, b, torch.ones(3), None, 1, 1.0, none, True), "factor: got"),
        (lambda: ops.lora_linear_grad_factors(grad, x[:4], low, low, None, x, none), "x: got"),
        (lambda: ops.lora_linear_grad_factors(grad, x, low, low.float(), None, x, none), "grad_low: got"),
        (lambda: ops.lora_linear_grad_factors(grad, x, low, low, torch.ones(24), grad[:3], none), "inner: got"),
        (lambda: head(bias=grad[0, :3]), "bias: got"),
        (lambda: head(valid=99), "valid: got 99"),
        (lambda: head(labels.int()), "labels: got torch.int32"),
        (lambda: ops.linear_softmax_grad_weight(x, weight, None, labels, torch.zeros(3, 5), 24, 1.0, 0.0), "factors: got"),
        (lambda: quantised(scales=scales[:1]), "scales: got"),
        (lambda: quantised(scales=scales.double()), "scales: got"),
        (lambda: quantised(codes.long()), "codes: got"),
        (lambda: quantised(bias=grad[0, :3]), "bias: got"),
        (lambda: quantised(low=low), "up: wanted"),
        (lambda: quantised(low=low, up=a), "up: got"),
        (lambda: quantised(low=low[:2], up=b), "low: got"),
        (lambda: grouped(two, torch.tensor([2, 2])), "counts: wanted numbers"),
        (lambda: grouped(two, torch.tensor([6, -1])), "counts: wanted numbers"),
        (lambda: grouped(two, counts.int()), "counts: got"),
        (lambda: grouped(two, counts[:1]), "weights: got 2 for 1 counts"),
        (lambda: grouped([weight, weight[:8]]), r"weights: got \[8, 16\] .* for group 1"),
        (lambda: grouped([weight, weight.float()]), "weights: got .*float32 for group 1"),
        (lambda: grouped(two, biases=(grad[0],)), "biases: got 1"),
        (lambda: grouped(two, biases=(grad[0], grad[0].float())), "biases: got .* for group 1"),
        (lambda: grouped(two, low=low, up=[b]), "up: got 1"),
        (lambda: grouped(two, low=low, up=[b, a]), "up: got"),
        (lambda: grouped(two, low=low[:3], up=ups), "low: got"),
        (lambda: grouped(two, seeds=torch.zeros(1, dtype=torch.int64), threshold=9), "seeds: got"),
        (lambda: ops.grouped_outer(grad, x[:4], counts, None, 0, 0, 16), "b: got"),
        (lambda: ops.gather_rows(x, places[0]), "index: wanted numbers below the rows, 5"),
        (lambda: ops.gather_rows(x, places), "index: got"),
        (lambda: ops.combine_rows(x, places, None), "index: wanted"),
        (lambda: ops.combine_rows(x, places.clamp(max=3), torch.ones(1, 3)), "weights: got"),
        (lambda: ops.combine_rows_backward(x[:3], x, places.clamp(max=3), None), "grad: got"),
        (lambda: ops.rms_norm_backward(x, None, x, x[0], torch.ones(4), False, True), "rstd: got"),
        (lambda: ops.rms_norm_backward(x[:2], None, x, x[0], torch.ones(5), False, True), "grad: got"),
        (lambda: ops.gated_activation_backward(x, x, 1.0, 0.0, 1.0, 0.0), "grad: got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert emulated.launches() == before


def test_a_bias_in_fp32_stays_so(emulated: Emulated) -> None:
    """As on a CPU: a bias that bf16 cannot tell from its neighbour is told apart in the fp32 sums of the kernels."""
    ops, x, weight = torch.ops.mswift, torch.zeros(3, 16, dtype=BF16), torch.zeros(24, 16, dtype=BF16)
    bias = torch.full((24,), 1 + 2.0**-8 + 2.0**-16)  # just above the middle of two numbers of bf16; rounded first, it would be 1
    wanted = torch.full((3, 24), 1 + 2.0**-7)
    a, b = torch.zeros(2, 16, dtype=BF16), torch.zeros(24, 2, dtype=BF16)
    factor = torch.full((24,), 3.0)
    assert torch.equal(ops.lora_linear(x, weight, bias, a, b, factor, None, 1, 1.0, [0] * 5)[0].float(), wanted)
    codes = quantise_int8(weight)
    assert torch.equal(ops.quantised_product(x, codes.codes, codes.magnitudes, 24, 16, 0, bias, None, None, False, [0] * 5).float(), wanted)
    grouped = ops.grouped_product(x, [weight, weight], torch.tensor([1, 2]), [bias, 2 * bias], None, [], False, 1.0, None, 0, 0, 16)
    assert torch.equal(grouped.float(), wanted * torch.tensor([1.0, 2.0, 2.0])[:, None])
    for width in (16, 648):  # a head on one block, and on a group of blocks
        for gradient in (0, 1):
            hidden, rows = torch.zeros(3, width, dtype=BF16), torch.zeros(24, width, dtype=BF16)
            stats = ops.linear_softmax(hidden, rows, bias, torch.tensor([0, 7, 23]), 24, 1.0, 0.0, gradient)[0]
            assert torch.equal(stats[3], bias[:3]), "the label's logit"


def test_a_head_whose_logits_are_scaled_to_nothing(emulated: Emulated) -> None:
    hidden, weight, labels = draw(4, 32, dtype=BF16).requires_grad_(), draw(50, 32, seed=1, dtype=BF16), torch.tensor([0, 7, 49, 3])
    scores = linear_log_probs(hidden, weight, labels, logit_scale=0.0, entropy_grad=True)
    assert torch.allclose(scores.entropy, torch.full((4,), 50.0).log(), atol=1e-5)
    (grad,) = torch.autograd.grad((scores.log_probs + scores.entropy).sum(), hidden)
    assert not grad.any()


def test_experts_are_read_where_they_lie(emulated: Emulated) -> None:
    """Their places are sent to the device once, for as long as they stay."""
    x, counts = draw(9, 16, dtype=BF16), torch.tensor([4, 5])
    weights, biases = [draw(24, 16, seed=i, dtype=BF16) for i in (1, 2)], [draw(24, seed=i, dtype=BF16) for i in (3, 4)]

    def call(weights: list[Tensor]) -> Tensor:
        return torch.ops.mswift.grouped_product(x, weights, counts, biases, None, [], False, 1.0, None, 0, 0, 16)

    def wanted() -> Tensor:
        parts = zip(x.split(counts.tolist()), weights, biases, strict=True)
        return torch.cat([part.double() @ weight.double().T + bias.double() for part, weight, bias in parts])

    first = call(weights)
    made = cuda_grouped._table.cache_info().misses
    assert relative(first, wanted()) < 4e-3
    assert torch.equal(call(weights), first)
    with torch.no_grad():
        weights[1].mul_(-2.0)
    assert relative(call(weights), wanted()) < 4e-3, "an optimizer's step is seen"
    assert cuda_grouped._table.cache_info().misses == made
    unaligned = [weight.new_empty(weight.numel() + 1)[1:].view(weight.shape).copy_(weight) for weight in weights]
    assert unaligned[0].data_ptr() % 16
    assert relative(call(unaligned), wanted()) < 4e-3
    gaps = [torch.cat((weight, weight), 1)[:, :16] for weight in weights]
    assert not gaps[0].is_contiguous()
    assert relative(call(gaps), wanted()) < 4e-3
    assert cuda_grouped._table.cache_info().misses == made + 2


def test_empty_tensors(emulated: Emulated) -> None:
    empty = torch.zeros(0, 2, 4, requires_grad=True)
    assert torch.autograd.grad(gated_activation(rms_norm(empty, torch.ones(4), 1e-6)).sum(), empty)[0].shape == empty.shape
    assert rotate(torch.zeros(0, 1, 2, 16), torch.zeros(2, 0, 8), interleaved=False).shape == (0, 1, 2, 16)
    assert rms_norm(torch.zeros(2, 0), torch.zeros(0), 1e-6).shape == (2, 0)
    none = linear_log_probs(torch.zeros(2, 8, dtype=BF16), torch.zeros(9, 8, dtype=BF16), torch.full((2,), -100))
    assert none.log_probs.tolist() == [0.0, 0.0]


def test_faces_say_why_a_kernel_does_not_run() -> None:
    single, half, double = (torch.zeros(2, 8, dtype=dtype) for dtype in (torch.float32, BF16, torch.float64))
    assert cuda_operators.hindrance(double) == "the CUDA kernel takes float32 or bfloat16, got float64"
    assert cuda_operators.hindrance(half, single) == "the CUDA kernel takes float32 or bfloat16, got bfloat16 and float32"
    assert cuda_operators.hindrance(single, dtypes=(BF16,)) == "the CUDA kernel takes bfloat16, got float32"
    assert cuda_operators.hindrance(half, half) == cuda.missing()


def test_every_kernel_is_registered_for_devices_and_takes_what_its_schema_says() -> None:
    for name in cuda_operators.KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mswift::{name}", "CUDA")
        schema = torch._C._jit_get_schemas_for_operator(f"mswift::{name}")[0]
        kernel = cuda_operators.KERNELS[name]
        assert list(kernel.__code__.co_varnames[: kernel.__code__.co_argcount])[1:] == [argument.name for argument in schema.arguments], name
