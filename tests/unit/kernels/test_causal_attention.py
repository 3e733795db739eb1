"""The compiled attention: equal to float64, in values and gradients, for odd lengths, rows end to end, windows, chunks and sinks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels.causal_attention import causal_attention, usable
from mswift.kernels.packed_attention import packed_attention
from tests.unit.kernels.isa import passed_with

pytestmark = pytest.mark.skipif(not extension.isa_at_least("avx512"), reason="the compiled kernels are not there, or the CPU has no AVX-512")
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
DTYPES = [torch.float32] + [torch.bfloat16] * extension.isa_at_least("avx512_bf16")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, auto_kernels: None) -> torch.dtype:
    return request.param


def by_definition(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], window: int | None, chunk: int | None, sinks: Tensor | None) -> Tensor:
    """In float64, with the matrix of scores ``[b, heads, s, s]``."""
    s, b, heads, d = q.shape
    k, v = (part.repeat_interleave(heads // part.shape[2], 2) for part in (k, v))
    place, row = torch.zeros(s, dtype=torch.long), torch.zeros(s, dtype=torch.long)
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        place[start:end], row[start:end] = torch.arange(end - start), number
    distance = place[:, None] - place
    seen = (distance >= 0) & (row[:, None] == row) & (distance < (window or s))
    if chunk is not None:
        seen &= place[:, None] // chunk == place // chunk
    scores = (torch.einsum("sbhd,tbhd->bhst", q, k) * d**-0.5).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(b, heads, s, 1)), -1)
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1)[..., :s], v)


def distance(found: Tensor, wanted: Tensor, floor: float = 1e-3) -> float:
    """In the 2-norm, relative to what is wanted, or to `floor` if that is more."""
    return float(((found.double() - wanted).norm() / wanted.norm().clamp(min=floor)).detach())


def check(
    dtype: torch.dtype, bounds: list[int], *, batch: int = 1, heads: int = 6, groups: int = 3, d: int = 16, dv: int = 32, **options: Any
) -> None:
    generator = torch.Generator().manual_seed(sum(bounds) + heads)
    shapes = [(bounds[-1], batch, heads, d), (bounds[-1], batch, groups, d), (bounds[-1], batch, groups, dv), (heads,)]
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    trained = 4 if options.pop("sinks", False) else 3
    sinks, exact_sinks = (inputs[3], exact[3]) if trained == 4 else (None, None)
    ours = causal_attention(*inputs[:3], torch.tensor(bounds, dtype=torch.int32), sinks=sinks, **options)
    wanted = by_definition(*exact[:3], bounds, options.get("window"), options.get("chunk"), exact_sinks)
    assert ours.shape == wanted.shape
    assert ours.dtype == dtype
    pull = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(ours, inputs[:trained], pull)
    expected = torch.autograd.grad(wanted, exact[:trained], pull.double())
    assert distance(ours, wanted) < LIMITS[dtype]
    # d score = p * (dp - delta) takes the difference of rounded numbers, of which nothing is left where one weight is near 1: in one or two tokens
    floor = 0.3 * float(max(part.norm() for part in expected))
    assert max(distance(*pair, floor) for pair in zip(found, expected, strict=True)) < (2 if dtype == torch.float32 else 4) * LIMITS[dtype]


VARIANTS: dict[str, dict[str, Any]] = {
    "one row of several tiles": {"bounds": [0, 150], "batch": 2},
    "wide scores": {"bounds": [0, 330], "heads": 2, "groups": 1},
    "rows end to end": {"bounds": [0, 20, 20, 85, 200], "d": 64, "dv": 64},
    "window": {"bounds": [0, 30, 230], "window": 70},
    "window of one": {"bounds": [0, 70], "window": 1, "sinks": True},
    "chunks": {"bounds": [0, 9, 180], "chunk": 50},
    "sinks": {"bounds": [0, 40, 130], "batch": 2, "sinks": True},
    "sinks and window": {"bounds": [0, 200], "window": 64, "sinks": True, "heads": 8, "groups": 8},
    "one token": {"bounds": [0, 1], "batch": 3, "sinks": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant: str, dtype: torch.dtype) -> None:
    check(dtype, **VARIANTS[variant])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(sum),
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    columns=st.tuples(st.sampled_from([16, 48, 80]), st.sampled_from([16, 32])),
    window=st.one_of(st.none(), st.integers(2, 150)),
    sinks=st.booleans(),
)
def test_any_shape(lengths: list[int], batch: int, groups: int, share: int, columns: tuple[int, int], window: int | None, sinks: bool) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    d, dv = columns
    for dtype in DTYPES:
        check(dtype, bounds, batch=batch, heads=groups * share, groups=groups, d=d, dv=dv, window=window, sinks=sinks)


def test_heads_as_a_fused_projection_has_them(dtype: torch.dtype) -> None:
    """Queries of a group lie beside its key and value: no copy, and the same values and gradients to the last bit."""
    s, groups, each, d = 70, 3, 4, 16
    fused = torch.randn(s, 2, groups, each + 2, d, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    pull = torch.randn(s, 2, groups * each, d, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for reshape in (lambda q: q, lambda q: q.flatten(2, 3)):
        query, key, value = fused[..., :each, :], fused[..., each, :], fused[..., each + 1, :]
        out = causal_attention(reshape(query), key, value, sinks=torch.arange(12.0) / 4)
        found.append((out, *torch.autograd.grad(out, fused, pull)))
    assert found[0][0].shape == pull.shape
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    one = fused[:, 0].detach()
    bounds = torch.tensor([0, 30, 70], dtype=torch.int32)
    parts = (one[..., :each, :], one[..., each, :], one[..., each + 1, :])
    rows = packed_attention(*parts, bounds)
    choice.select("reference")
    assert distance(rows, packed_attention(*parts, bounds).double()) < 2 * LIMITS[dtype]
    with pytest.raises(RuntimeError, match="groups, heads of each"):
        torch.ops.mswift.causal_attention(fused[..., :each, :], fused[:, :, :1, 0], fused[:, :, :1, 0], bounds, None, 1.0, 0, 0)


@pytest.mark.parametrize("length", [70, 200])
def test_no_worse_than_torch(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(length, heads, 32, generator=generator).to(dtype).requires_grad_() for heads in (6, 3, 3)]
    exact = [part.detach().double()[:, None].requires_grad_() for part in inputs]
    bounds = torch.tensor([0, length])
    wanted = by_definition(*exact, bounds.tolist(), None, None, None)[:, 0]
    pull = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(dtype)
    expected = [part[:, 0] for part in torch.autograd.grad(wanted, exact, pull.double())]
    errors = {}
    for kernels in ("auto", "reference"):
        choice.select(kernels)
        assert usable(*inputs, softcap=None, dropout_p=0.0) == (kernels == "auto")
        out = packed_attention(*inputs, bounds)
        parts = (out, *torch.autograd.grad(out, inputs, pull))
        errors[kernels] = [distance(*pair) for pair in zip(parts, (wanted, *expected), strict=True)]
    assert all(ours < 1.3 * theirs for ours, theirs in zip(errors["auto"], errors["reference"], strict=True))


def test_views_and_threads_change_nothing(dtype: torch.dtype) -> None:
    """Queries, keys and values as they lie in one fused projection; one thread and two; the same bits each time."""
    fused = torch.randn(190, 2, 3, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    bounds = torch.tensor([0, 100, 190])

    def run(whole: bool) -> tuple[Tensor, Tensor]:
        q, k, v = fused[..., :3, :].reshape(190, 2, 9, 32), fused[..., 3, :], fused[..., 4, :]
        assert not k.is_contiguous()
        out = causal_attention(*(part.contiguous() for part in (q, k, v)) if whole else (q, k, v), bounds)
        return out, torch.autograd.grad(out.float().square().sum(), fused)[0]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, gradient = run(True)
        for count, whole in ((1, False), (2, False), (3, True)):
            torch.set_num_threads(count)
            again, gradient_again = run(whole)
            assert torch.equal(out, again)
            assert torch.equal(gradient, gradient_again) or count > 1  # with several threads, keys' gradients are summed head by head
            assert distance(gradient_again, gradient.double()) < LIMITS[dtype]
            assert torch.equal(gradient_again, run(whole)[1])
    finally:
        torch.set_num_threads(threads)


def test_extreme_scores_and_nothing_at_all(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(80, 1, 2, 16, generator=torch.Generator().manual_seed(1)) * factor for factor in (300, 300, 1))
    inputs = [part.to(dtype).requires_grad_() for part in (q, k, v)]
    out = causal_attention(*inputs)
    wanted = by_definition(*(part.detach().double() for part in inputs), [0, 80], None, None, None)
    assert distance(out, wanted) < 10 * LIMITS[dtype]  # scores of 1e5: their rounding shows where two are close
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.float().sum(), inputs))
    empty = torch.zeros(0, 1, 2, 16, dtype=dtype, requires_grad=True)
    assert causal_attention(empty, empty, empty).shape == (0, 1, 2, 16)
    assert torch.autograd.grad(causal_attention(empty, empty, empty).sum(), empty)[0].shape == empty.shape


def test_what_torch_checks_of_an_operator(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(70, 1, heads, 16, generator=make).to(dtype).requires_grad_() for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=make).requires_grad_()
    for arguments in ((q, k, v, torch.tensor([0, 5, 70]), None, 0.25, 0, 0), (q, k, v, torch.tensor([0, 70]), sinks, 0.3, 9, 0)):
        report = torch.library.opcheck(torch.ops.mswift.causal_attention.default, arguments)
        assert set(report.values()) == {"SUCCESS"}


def test_arguments_are_named_in_errors() -> None:
    x = torch.randn(8, 1, 2, 16)
    for arguments, message in (
        ((x, x[..., :1, :].expand(8, 1, 3, 16), x), "heads|groups"),
        ((x, x.double(), x), "k and v must have the dtype of q"),
        ((x[..., :10], x[..., :10], x), "multiple of 16"),
        ((x, x, x, torch.tensor([0, 9])), "bounds must rise from 0"),
        ((x, x, x, torch.tensor([0, 6, 4, 8])), "bounds must rise from 0"),
        ((x, x, x, None, -1.0), "scale must be above 0"),
    ):
        q, k, v, *rest = arguments
        bounds, scale = rest[0] if rest and rest[0] is not None else torch.tensor([0, 8]), rest[1] if len(rest) == 2 else 1.0
        with pytest.raises(RuntimeError, match=message):
            torch.ops.mswift.causal_attention(q, k, v, bounds, None, scale, 0, 0)


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="AVX-512 is what the other tests run")
def test_the_code_for_avx512_as_well() -> None:
    assert passed_with("avx512", __file__, "float32 and (values or views or worse)") > 10


def test_when_it_runs() -> None:
    x = torch.randn(70, 2, 16)
    before = choice.selected()
    try:
        choice.select("auto")
        assert usable(x, x, x, softcap=None, dropout_p=0.0)
        assert not usable(x, x, x, softcap=30.0, dropout_p=0.0)
        assert not usable(x, x, x, softcap=None, dropout_p=0.1)
        assert "multiple of 16" in (choice.hindrance("attention", x[..., :12], x[..., :12], x) or "")
        assert "float32 and bfloat16" in (choice.hindrance("attention", x.double(), x.double(), x.double()) or "")
        bounds = torch.tensor([0, 30, 70], dtype=torch.int32)
        compiled = packed_attention(x, x, x, bounds, window=9)
        choice.select("reference")
        assert not usable(x, x, x, softcap=None, dropout_p=0.0)
        assert distance(compiled, packed_attention(x, x, x, bounds, window=9).double()) < 1e-6
    finally:
        choice.select(before)
