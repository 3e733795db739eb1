"""Norms, gated activations and rotations in one pass: equal to float64, in values and gradients, and to the plain-torch references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels.elementwise import GELU_TANH, SILU, Gate, add_rms_norm, gated_activation, rms_norm, rotate, rotate_
from tests.unit.kernels.isa import passed_with

pytestmark = [
    pytest.mark.usefixtures("auto_kernels"),
    pytest.mark.skipif(not extension.isa_at_least("avx2"), reason="the compiled kernels are not there, or the CPU has no AVX2"),
]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
GATES = {"silu": SILU, "gelu": GELU_TANH, "clamped": Gate(slope=1.702, limit=1.0, offset=1.0)}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)).detach())


def check(function: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """The kernel beside float64, and no worse than the reference in the same dtype."""
    dtype = inputs[0].dtype
    exact = [part.detach().double().requires_grad_() for part in inputs]
    inputs = [part.detach().requires_grad_() for part in inputs]
    wanted = definition(*exact)
    pull = draw(*wanted.shape, seed=9, dtype=dtype)
    expected = (wanted, *torch.autograd.grad(wanted, exact, pull.double()))
    errors = {}
    for kernels in ("auto", "reference"):
        choice.select(kernels)
        out = function(*inputs)
        assert out.dtype == dtype
        assert out.shape == wanted.shape
        parts = (out, *torch.autograd.grad(out, inputs, pull))
        errors[kernels] = [distance(*pair) for pair in zip(parts, expected, strict=True)]
    choice.select("auto")
    rounding = [distance(part.detach().to(dtype), part) for part in expected]  # of few values it may exceed the limit
    assert all(ours < max(LIMITS[dtype], 1.001 * least) for ours, least in zip(errors["auto"], rounding, strict=True))
    assert all(ours < max(1.3 * theirs, 3e-7) for ours, theirs in zip(errors["auto"], errors["reference"], strict=True))


def norm_by_definition(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight


def gate_by_definition(x: Tensor, gate: Gate) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    a, b = a.clamp(max=gate.limit), b.clamp(-gate.limit, gate.limit)
    activated = torch.nn.functional.gelu(a, approximate="tanh") if gate.cubic else a * (gate.slope * a).sigmoid()
    return activated * (b + gate.offset)


def rotation_by_definition(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    half = table.shape[-1]
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + 1 if interleaved else first + half
    angle = torch.complex(*table.double())[:, None, None]
    turned = torch.complex(x[..., first], x[..., second]) * angle
    return x.index_copy(3, first, turned.real).index_copy(3, second, turned.imag)


def table_of(tokens: int, half: int) -> Tensor:
    angles = draw(tokens, half, seed=5)
    return torch.stack((angles.cos(), angles.sin()))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(9, 90), bf16=st.booleans(), zero_centred=st.booleans())
def test_norm(rows: int, columns: int, bf16: bool, zero_centred: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, weight = draw(rows, 2, columns, dtype=dtype), draw(columns, seed=1, dtype=dtype)
    check(
        lambda x, w: rms_norm(x, w, 1e-3, zero_centred=zero_centred),
        lambda x, w: norm_by_definition(x, 1.0 + w if zero_centred else w),
        [x, weight],
    )


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(9, 90), bf16=st.booleans(), zero_centred=st.booleans())
def test_norm_of_a_sum(rows: int, columns: int, bf16: bool, zero_centred: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, residual = ((8 * draw(rows, 2, columns, seed=seed)).round().div(8).to(dtype) for seed in (0, 2))  # whose sum needs no rounding
    weight = draw(columns, seed=1, dtype=dtype)
    check(
        lambda x, r, w: torch.stack(add_rms_norm(x, r, w, 1e-3, zero_centred=zero_centred)),
        lambda x, r, w: torch.stack((norm_by_definition(x + r, 1.0 + w if zero_centred else w), x + r)),
        [x, residual, weight],
    )
    normed, total = add_rms_norm(x, residual, weight, 1e-3, zero_centred=zero_centred)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-3, zero_centred=zero_centred))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["norm", "sum", "both"])
def test_gradients_of_a_sum_and_its_norm(used: tuple[int, ...]) -> None:
    x, residual, weight = draw(4, 33).requires_grad_(), draw(4, 33, seed=2), draw(33, seed=1).requires_grad_()
    found, wanted = [], []
    for kernels, grads in (("auto", found), ("reference", wanted)):
        choice.select(kernels)
        outputs = add_rms_norm(x, residual, weight, 1e-3)
        loss = sum(outputs[i].square().sum() for i in used)
        grads += torch.autograd.grad(loss, (x, weight), allow_unused=True, materialize_grads=True)
    assert all(distance(*pair) < 1e-6 for pair in zip(found, wanted, strict=True))
    assert bool(found[1].any()) == (0 in used)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 90), bf16=st.booleans(), name=st.sampled_from(sorted(GATES)))
def test_gate(rows: int, columns: int, bf16: bool, name: str) -> None:
    x = 2 * draw(rows, 2, 2 * columns, dtype=torch.bfloat16 if bf16 else torch.float32)
    check(lambda x: gated_activation(x, GATES[name]), lambda x: gate_by_definition(x, GATES[name]), [x])


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 5), heads=st.integers(1, 3), half=st.integers(1, 20), rest=st.integers(0, 9), bf16=st.booleans(), interleaved=st.booleans()
)
def test_rotation(tokens: int, heads: int, half: int, rest: int, bf16: bool, interleaved: bool) -> None:
    x, table = draw(tokens, 2, heads, 2 * half + rest, dtype=torch.bfloat16 if bf16 else torch.float32), table_of(tokens, half)
    check(lambda x: rotate(x, table, interleaved=interleaved), lambda x: rotation_by_definition(x, table, interleaved), [x])


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3)),
    each=st.integers(1, 4),
    skipped=st.integers(0, 2),
    half=st.integers(1, 20),
    rest=st.integers(0, 9),
    bf16=st.booleans(),
    interleaved=st.booleans(),
)
def test_rotation_in_place(shape: tuple[int, int, int], each: int, skipped: int, half: int, rest: int, bf16: bool, interleaved: bool) -> None:
    """Some heads of each group of a fused projection, without a copy; the others are left as they are."""
    (s, b, groups), width, turned = shape, 2 * half + rest, max(1, each - skipped)
    x, table = draw(s, b, groups * each * width, dtype=torch.bfloat16 if bf16 else torch.float32), table_of(s, half)

    def by_definition(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (groups, each, width))
        front = rotation_by_definition(heads[..., :turned, :].flatten(2, 3), table, interleaved).unflatten(2, (groups, turned))
        return torch.cat((front, heads[..., turned:, :]), 3).flatten(2)

    layout: dict[str, Any] = {"width": width, "each": each, "turned": turned, "interleaved": interleaved}
    check(lambda x: rotate_(x.clone(), table, **layout), by_definition, [x])
    before = x.clone().unflatten(-1, (groups, each, width))
    assert rotate_(x, table, **layout) is x
    after = x.unflatten(-1, (groups, each, width))
    assert torch.equal(after[..., turned:, :], before[..., turned:, :])
    apart = rotate(before[..., :turned, :].flatten(2, 3), table, interleaved=interleaved)
    assert torch.equal(after[..., :turned, :].flatten(2, 3), apart)


def test_a_gradient_is_turned_back_in_place_where_nobody_else_holds_it() -> None:
    x, table, layout = draw(4, 2, 12).requires_grad_(), table_of(4, 3), {"width": 6, "interleaved": False}

    def copies(out: Tensor) -> int:
        with torch.profiler.profile() as run:
            out.sum().backward()
        return sum(event.name == "aten::clone" for event in run.events())

    assert copies(rotate_(x * 2, table, **layout) * 3) == 0
    alone = x.grad
    x.grad = None
    assert copies(rotate(x.unflatten(-1, (2, 6)) * 2, table, interleaved=False) * 3) == 0
    assert alone is not None
    assert x.grad is not None
    assert distance(alone, x.grad.double()) < 1e-6
    assert copies(rotate_(x * 2, table, **layout)) == 1  # of a sum: one value, in all places
    pull = draw(4, 2, 12, seed=1)
    for given_pull in (pull, pull[:, :1].expand(4, 2, 12)):
        kept = given_pull.clone()
        torch.autograd.grad(rotate_(x.clone(), table, **layout), x, given_pull)
        assert torch.equal(given_pull, kept)
    joined = torch.cat((rotate_(x.clone(), table, **layout), x))  # whose gradient is a part of what is pulled with
    pull = draw(8, 2, 12, seed=2)
    kept = pull.clone()
    torch.autograd.grad(joined, x, pull)
    assert torch.equal(pull, kept)
    pull, push = draw(4, 2, 12, seed=3).requires_grad_(), draw(4, 2, 12, seed=4)
    (back,) = torch.autograd.grad(rotate_(x.clone(), table, **layout), x, pull, create_graph=True)
    (forth,) = torch.autograd.grad(back, pull, push)
    assert torch.equal(forth, rotate_(push.clone(), table, **layout))


def test_what_was_kept_of_the_old_values_is_missed() -> None:
    x, table = draw(3, 1, 8).requires_grad_(), table_of(3, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotate_(x.exp(), table, width=8, interleaved=True).sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        rotate_(x, table, width=8, interleaved=True)
    fused = x * 2
    front = fused[..., 4:]  # part of something: its neighbours' gradients are whole
    rotate_(front, table[:, :, :1], width=4, interleaved=True)
    assert torch.equal(fused[..., :4], 2 * x[..., :4])
    pull = draw(3, 1, 8, seed=1)
    (found,) = torch.autograd.grad(fused, x, pull)
    assert torch.equal(found[..., :4], 2 * pull[..., :4])
    back = table[:, :, :1] * torch.tensor([1.0, -1.0])[:, None, None]
    assert distance(found[..., 4:], 2 * rotate_(pull[..., 4:].clone(), back, width=4, interleaved=True)) < 1e-6


def test_views_extremes_and_nothing() -> None:
    fused = draw(6, 2, 3, 5, 16).requires_grad_()
    part, table = fused[..., 3, :], table_of(6, 8)
    assert not part.is_contiguous()
    assert torch.equal(rotate(part, table, interleaved=True), rotate(part.contiguous(), table, interleaved=True))
    assert torch.equal(rms_norm(part, table[0, 0].repeat(2), 1e-6), rms_norm(part.contiguous(), table[0, 0].repeat(2), 1e-6))
    wide = torch.tensor([[-1e4, 1e4, -100.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert gated_activation(wide)[0].tolist() == pytest.approx([0.0, 1e4, 0.0, 0.0])
    assert gated_activation(torch.full((1, 2), float("nan"), dtype=torch.bfloat16)).isnan().all()
    assert rms_norm(torch.full((2, 4), 1e18), torch.ones(4), 1e-6).flatten().tolist() == pytest.approx([1.0] * 8)
    empty = torch.zeros(0, 2, 4, requires_grad=True)
    assert torch.autograd.grad(gated_activation(rms_norm(empty, torch.ones(4), 1e-6)).sum(), empty)[0].shape == empty.shape
    assert rotate(torch.zeros(0, 1, 2, 16), torch.zeros(2, 0, 8), interleaved=False).shape == (0, 1, 2, 16)
    assert rotate_(torch.zeros(0, 1, 32), torch.zeros(2, 0, 8), width=16, interleaved=False).shape == (0, 1, 32)
    rows = draw(4, 6, 2, 8)
    for x in (rows[:, ::2], rows.transpose(0, 1)[:4, 1:], rows[..., 1, :]):
        wanted = rotate_(x.contiguous(), table[:, :4, :3], width=8, interleaved=True)
        assert torch.equal(rotate_(x, table[:, :4, :3], width=8, interleaved=True), wanted)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_the_code_for_other_processors_as_well(isa: str) -> None:
    if not extension.isa_at_least(isa) or extension.isa() == isa:
        pytest.skip(f"{isa} is more than there is, or what the other tests run")
    assert passed_with(isa, __file__, "norm or gate or rotation or views") >= 7


def test_threads_agree() -> None:
    x = draw(400, 1, 96, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = (rms_norm(x, x[0, 0], 1e-5), gated_activation(x), *add_rms_norm(x, x.flip(0), x[0, 0], 1e-5))
        torch.set_num_threads(2)
        together = (rms_norm(x, x[0, 0], 1e-5), gated_activation(x), *add_rms_norm(x, x.flip(0), x[0, 0], 1e-5))
        assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_torch_checks_of_an_operator(dtype: torch.dtype) -> None:
    ops = torch.ops.mswift
    x, weight = draw(3, 2, 2, 8, dtype=dtype).requires_grad_(), draw(8, seed=1, dtype=dtype).requires_grad_()
    calls = [
        (ops.rms_norm.default, (x, weight, 1e-5, True)),
        (ops.add_rms_norm.default, (x, x.detach().flip(0), weight, 1e-5, False)),
        (ops.gated_activation.default, (x, 1.0, 0.0, 7.0, 0.5)),
        (ops.rotate.default, (x, table_of(3, 3), False, False)),
        (ops.rotate_.default, (x.clone(), table_of(3, 3), 8, 2, 1, False, False)),
        (ops.rotate_.default, (x.detach(), table_of(3, 3), 8, 1, 1, True, True)),
    ]
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_arguments_are_named_in_errors() -> None:
    x = draw(3, 1, 2, 8)
    for call, message in (
        (lambda: torch.ops.mswift.rms_norm(x, x[0, 0, 0, :4], 1e-5, False), "weight must be"),
        (lambda: torch.ops.mswift.add_rms_norm(x, x[:2], x[0, 0, 0], 1e-5, False), "residual must be as x"),
        (lambda: torch.ops.mswift.gated_activation(x[..., :3], 1.0, 0.0, 1.0, 0.0), "gate and up side by side"),
        (lambda: torch.ops.mswift.gated_activation(x, 1.0, 0.0, -1.0, 0.0), "limit must be above 0"),
        (lambda: torch.ops.mswift.rotate(x, table_of(2, 4), False, False), "table must be"),
        (lambda: torch.ops.mswift.rotate_(x, table_of(2, 4), 8, 1, 1, False, False), "table must be"),
        (lambda: torch.ops.mswift.rotate_(x, table_of(3, 4), 8, 3, 1, False, False), "a multiple of 3 heads of 8 columns"),
        (lambda: torch.ops.mswift.rotate_(x, table_of(3, 4), 8, 1, 2, False, False), "turned must be"),
        (lambda: torch.ops.mswift.rotate_(x[..., ::2], table_of(3, 1), 4, 1, 1, False, False), "side by side"),
        (lambda: torch.ops.mswift.rotate_(x[:, :, :1].expand(3, 1, 2, 8), table_of(3, 4), 8, 1, 1, False, False), "single memory location"),
        (lambda: torch.ops.mswift.rms_norm(x.double(), x[0, 0, 0], 1e-5, False), "float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert "float32 and bfloat16" in (choice.hindrance("rms_norm", x.double()) or "")
