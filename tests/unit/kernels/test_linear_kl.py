"""Divergences of two heads against torch's own in fp64: kinds, the likeliest tokens, chunks, teachers of another size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import linear_kl as module
from mswift.kernels.linear_kl import linear_kl
from tests.distributed.harness import run_distributed


def inputs(tokens: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((tokens, 6), (vocab, 6), (tokens, 9), (vocab + 2, 9)))  # type: ignore[return-value]


def reference(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float, top_k: int | None) -> Tensor:
    if top_k is not None:
        places = teacher.argsort(-1, descending=True)[:, :top_k]
        student, teacher = student.gather(1, places), teacher.gather(1, places)
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        seen = a > 0
        return torch.where(seen, a * (torch.where(seen, a, 1.0).log() - torch.where(seen, b, 1.0).log()), 0.0).sum(-1)

    m = beta * q + (1 - beta) * p
    return {"forward": lambda: kl(q, p), "reverse": lambda: kl(p, q), "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m)}[kind]()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    vocab=st.integers(2, 30),
    kind=st.sampled_from(["forward", "reverse", "jsd"]),
    beta=st.sampled_from([0.1, 0.5, 0.8]),
    temperature=st.sampled_from([1.0, 2.5]),
    top=st.booleans(),
    from_logits=st.booleans(),
    chunk=st.sampled_from([1, 2**20]),
    seed=st.integers(0, 50),
)
def test_values_and_gradients(
    tokens: int, vocab: int, kind: Any, beta: float, temperature: float, top: bool, from_logits: bool, chunk: int, seed: int
) -> None:
    hidden, weight, other, other_weight = inputs(tokens, vocab, seed)
    hidden.requires_grad_(), weight.requires_grad_()
    valid, top_k = vocab - 1, 2 if top and vocab > 2 else None
    teacher: dict[str, Any] = (
        {"teacher_logits": other @ other_weight.t()} if from_logits else {"teacher_hidden": other, "teacher_weight": other_weight}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk)
        found = linear_kl(hidden, weight, **teacher, kind=kind, beta=beta, temperature=temperature, top_k=top_k, vocab_size=valid)
        upstream = torch.linspace(-1, 1, tokens)
        grads = torch.autograd.grad(found, (hidden, weight), upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference(
        (exact[0] @ exact[1].t())[:, :valid], (other.double() @ other_weight.double().t())[:, :valid], kind, beta, temperature, top_k
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, truth in zip(grads, torch.autograd.grad(expected, exact, upstream.double())):
        torch.testing.assert_close(mine.double(), truth, atol=2e-5, rtol=1e-5)
    assert grads[1][valid:].count_nonzero() == 0


def test_tokens_that_do_not_count() -> None:
    hidden, weight, other, other_weight = inputs(12, 20)
    mask = torch.arange(12).view(3, 4) % 3 == 0
    hidden.requires_grad_()
    found = linear_kl(hidden.view(3, 4, 6), weight, other.view(3, 4, 9), other_weight, mask=mask)
    whole = linear_kl(hidden, weight, other, other_weight).view(3, 4)
    assert torch.equal(found[mask], whole[mask])
    assert found[~mask].count_nonzero() == 0
    found.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.view(3, 4, 6).abs().sum(-1) > 0, mask)
    assert bool((linear_kl(hidden, weight, hidden, weight, kind="jsd").abs() < 1e-6).all()), "equal heads do not differ"


def test_wrong_arguments_are_named() -> None:
    hidden, weight, other, other_weight = inputs(5, 8)
    for kwargs, message in [
        ({}, "teacher_logits: wanted either"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "kind": "both"}, "kind: got 'both'"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "kind": "jsd", "beta": 1.0}, "beta: got 1.0"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "temperature": 0.0}, "temperature: got 0.0"),
        ({"teacher_hidden": other[:3], "teacher_weight": other_weight}, r"teacher: got tokens \(3,\), wanted \(5,\)"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "mask": torch.ones(2)}, "mask: got tokens"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "top_k": 9}, "top_k: got 9, wanted 1 to 8"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "mask": torch.ones(5)}, "mask: got torch.float32, wanted torch.bool"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "labels": torch.ones(5)}, "labels: got torch.float32, wanted torch.int64"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "token_weights": torch.ones(4)}, r"token_weights: got tokens \(4,\)"),
        ({"teacher_hidden": other, "teacher_weight": other_weight[:, :5]}, r"teacher_weight: got torch.float32 \(10, 5\), wanted .*vocabulary, 9"),
        ({"teacher_hidden": other.long(), "teacher_weight": other_weight}, "teacher_hidden: got torch.int64"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "teacher_bias": torch.ones(3)}, r"teacher_bias: got \(3,\), wanted \[10\]"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "student_bias": torch.ones(1)}, r"student_bias: got \(1,\), wanted \[8\]"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "student_softcap": -1.0}, "student_softcap: got -1.0"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "teacher_logit_scale": 0.0}, "teacher_logit_scale: got 0.0"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "vocab_size": 9}, "vocab_size: got 9, wanted 1 to 8"),
        ({"teacher_hidden": other, "teacher_weight": other_weight, "vocab_size": 0}, "vocab_size: got 0"),
        ({"teacher_logits": torch.ones(5, 8), "teacher_softcap": 2.0}, "teacher_softcap.*none of these with teacher_logits"),
        ({"teacher_logits": torch.ones(5, 8).long()}, "teacher_logits: got torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_kl(hidden, weight, **kwargs)
    for wrong in (weight[:, :4], weight[0]):
        with pytest.raises(ValueError, match="student_weight: got"):
            linear_kl(hidden, wrong, other, other_weight)


KINDS = [(kind, top_k) for kind in ("forward", "reverse", "jsd") for top_k in (None, 1, 5)]


def _operands(vocab: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads of `rows` rows, of which `vocab` are no padding."""
    hidden, weight, other, other_weight = inputs(13, vocab, seed=2)
    weight, other_weight = (torch.nn.functional.pad(part[:vocab], (0, 0, 0, rows - vocab), value=3.0) for part in (weight, other_weight))
    return hidden, weight, other, other_weight


def _ranks(rank: int, world: int, vocab: int, rows: int, from_logits: bool, reduce_grad: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    import torch.distributed as dist

    hidden, weight, other, other_weight = _operands(vocab, rows)
    weight, other_weight = (part.chunk(world)[rank].contiguous() for part in (weight, other_weight))
    teacher: dict[str, Any] = (
        {"teacher_logits": other @ other_weight.t()} if from_logits else {"teacher_hidden": other, "teacher_weight": other_weight}
    )
    results = []
    for kind, top_k in KINDS:
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        options: Any = {"kind": kind, "beta": 0.3, "temperature": 1.7, "top_k": top_k, "vocab_size": vocab, "reduce_grad": reduce_grad}
        found = linear_kl(*leaves, **teacher, **options, group=dist.group.WORLD)
        results.append((found.detach(), *torch.autograd.grad(found, leaves, torch.linspace(-1, 2, len(found)))))
    return results


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("vocab", "rows"), [(31, 32), (9, 16)], ids=["some padding", "a rank of padding"])
@pytest.mark.parametrize("from_logits", [False, True])
def test_ranks_that_share_the_vocabulary(world: int, vocab: int, rows: int, from_logits: bool) -> None:
    ranks = run_distributed(_ranks, world, vocab, rows, from_logits, not from_logits)
    hidden, weight, other, other_weight = (part.double() for part in _operands(vocab, rows))
    for i, (kind, top_k) in enumerate(KINDS):
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        expected = reference((leaves[0] @ leaves[1].t())[:, :vocab], (other @ other_weight.t())[:, :vocab], kind, 0.3, 1.7, top_k)
        truth = torch.autograd.grad(expected, leaves, torch.linspace(-1, 2, 13, dtype=torch.float64))
        parts = [found[i] for found in ranks]
        to_hidden = parts[0][1] if not from_logits else torch.stack([part[1] for part in parts]).sum(0)
        assert all(torch.equal(part[0], parts[0][0]) for part in parts), "ranks disagree"
        torch.testing.assert_close(parts[0][0].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(to_hidden.double(), truth[0], atol=3e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([part[2] for part in parts]).double(), truth[1], atol=3e-5, rtol=1e-5)


OPTIONS: dict[str, Any] = {"student_softcap": 3.0, "teacher_softcap": 2.0, "student_logit_scale": 1.3, "teacher_logit_scale": 0.7}


def capped(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, cap: float) -> Tensor:
    return torch.tanh((hidden @ weight.t() + bias) * scale / cap) * cap


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_bias_factor_and_limit_of_either_side(kind: Any, top_k: int | None) -> None:
    hidden, weight, other, other_weight = inputs(21, 30)
    bias, other_bias = torch.randn(30), torch.randn(32)
    weights = torch.arange(21).remainder(3).float()
    labels = torch.where(torch.arange(21) % 5 == 1, -7, 1)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", 1)
        patch.setattr(module, "_ROOM_BYTES", 1)
        options: Any = {"kind": kind, "beta": 0.3, "temperature": 1.4, "top_k": top_k, "token_weights": weights, "labels": labels, "ignore_index": -7}
        found = linear_kl(*leaves[:2], other, other_weight, student_bias=leaves[2], teacher_bias=other_bias, **options, **OPTIONS)
        grads = torch.autograd.grad(found, leaves, torch.linspace(-1, 2, 21))
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    teacher = capped(other.double(), other_weight.double(), other_bias.double(), 0.7, 2.0)[:, :30]
    expected = reference(capped(*exact, 1.3, 3.0), teacher, kind, 0.3, 1.4, top_k) * weights * (labels != -7)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.count_nonzero() == ((weights != 0) & (labels != -7)).sum()
    for mine, truth in zip(grads, torch.autograd.grad(expected, exact, torch.linspace(-1, 2, 21, dtype=torch.float64))):
        torch.testing.assert_close(mine.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_tokens_that_are_banned(kind: Any) -> None:
    """Logits of minus infinity: of both sides, and of the side on which the divergence stays finite."""
    hidden, weight, other, other_weight = inputs(11, 20)
    bias, other_bias = torch.zeros(20), torch.zeros(22)
    bias[3] = other_bias[3] = -torch.inf
    (bias if kind == "reverse" else other_bias)[5:8] = -torch.inf
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    found = linear_kl(*leaves, other, other_weight, student_bias=bias, teacher_bias=other_bias, kind=kind)
    grads = torch.autograd.grad(found.sum(), leaves)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    teacher = (other.double() @ other_weight.double().t() + other_bias)[:, :20]
    expected = reference(exact[0] @ exact[1].t() + bias.clamp(min=-1e9), teacher.clamp(min=-1e9), kind, 0.5, 1.0, None)
    assert bool((expected > 1e-3).all())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, truth in zip(grads, torch.autograd.grad(expected.sum(), exact)):
        torch.testing.assert_close(mine.double(), truth, atol=1e-5, rtol=1e-5)
    logits = (other @ other_weight.t() + other_bias)[:, :20]
    same = linear_kl(hidden, weight, teacher_logits=logits, student_bias=bias, kind=kind)
    torch.testing.assert_close(same, found.detach(), atol=1e-6, rtol=1e-5)
    if kind != "jsd":  # what one side bans and the other says is infinitely far
        swapped = (other_bias[:20], torch.nn.functional.pad(bias, (0, 2)))
        far = linear_kl(hidden, weight, other, other_weight, student_bias=swapped[0], teacher_bias=swapped[1], kind=kind)
        assert far.tolist() == [torch.inf] * 11


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_extreme_logits(kind: Any) -> None:
    hidden, weight, other, other_weight = inputs(9, 40)
    leaves = [(hidden * 3e3).requires_grad_(), weight.clone().requires_grad_()]
    found = linear_kl(*leaves, other * 2e3, other_weight, kind=kind)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    logits, teacher = exact[0] @ exact[1].t(), (other.double() * 2e3 @ other_weight.double().t())[:, :40]
    assert 1e4 < logits.abs().max().item() < 1e5
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return (of.exp() * (of - to)).sum(-1)

    expected = {"forward": kl(log_q, log_p), "reverse": kl(log_p, log_q), "jsd": (kl(log_q, log_m) + kl(log_p, log_m)) / 2}[kind]
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=1e-5)  # ulps of logits of 3e4
    for mine, truth in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), exact)):
        assert (mine.double() - truth).norm() <= 1e-5 * truth.norm() + 1e-6


@pytest.mark.parametrize("trained", [False, True])
def test_the_same_under_autocast_for_values_and_gradients(trained: bool) -> None:
    hidden, weight, other, other_weight = (tensor * 2 for tensor in inputs(33, 50))

    def run(tensors: tuple[Tensor, ...], cast: bool) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:2]][: 2 if trained else 1]
        weight = leaves[1] if trained else tensors[1]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            found = linear_kl(leaves[0], weight, *tensors[2:], kind="reverse")
        assert found.dtype == torch.float32
        return [found.detach(), *(grad.float() for grad in torch.autograd.grad(found, leaves, torch.linspace(-1, 2, 33)))]

    tensors = (hidden, weight, other, other_weight)
    cast, low, plain = run(tensors, True), run(tuple(tensor.bfloat16() for tensor in tensors), False), run(tensors, False)
    for mine, same, exact in zip(cast, low, plain):
        assert torch.equal(mine, same), "what bf16 operands give"
        assert 0 < (mine - exact).abs().max().item() < 0.05 * exact.abs().max().item()


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("steepness", "allowed"), [(0.0, 1.05), (1.0, 1.3)], ids=["even", "uneven"])
def test_bf16_is_no_worse_than_eager_with_fp32_divergences(kind: Any, top_k: int | None, steepness: float, allowed: float) -> None:
    """But for one more rounding of the hidden states' gradient, which is multiplied by the losses' after the product."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(96, 32, generator=generator).bfloat16()
    weight = torch.randn(1500, 32, generator=generator).mul(32**-0.5).bfloat16()
    logits = torch.randn(96, 1500, generator=generator)
    upstream = 1.0 + steepness * torch.linspace(-0.5, 1.0, 96)

    def measured(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        found = function(*leaves)
        return [found.detach().double(), *(grad.double() for grad in torch.autograd.grad(found, leaves, upstream.to(found.dtype)))]

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return linear_kl(x, w, teacher_logits=logits, kind=kind, top_k=top_k)

    def exact(x: Tensor, w: Tensor) -> Tensor:
        return reference(x @ w.t(), logits.double(), kind, 0.5, 1.0, top_k)

    def eager_with_fp32(x: Tensor, w: Tensor) -> Tensor:
        return reference((x @ w.t()).float(), logits, kind, 0.5, 1.0, top_k)

    truth = measured(exact, [hidden.double().requires_grad_(), weight.double().requires_grad_()])
    mine, theirs = (measured(function, [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]) for function in (ours, eager_with_fp32))
    for name, own, peer, right in zip(("values", "hidden", "weight"), mine, theirs, truth):
        assert (own - right).norm() <= (allowed if name == "hidden" else 1.05) * (peer - right).norm() + 1e-6 * right.norm(), name
        assert (own - right).norm() < 1e-2 * right.norm(), name


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_finite_differences(kind: Any, top_k: int | None) -> None:
    hidden, weight, other, other_weight = inputs(3, 7, seed=4)
    bias = torch.linspace(-1, 1, 7)
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kl(
            x.float(), w.float(), other, other_weight, student_bias=b.float(), kind=kind, top_k=top_k, temperature=1.5, student_softcap=4.0
        )

    assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=2e-3, rtol=2e-3)
    once = function(*leaves).sum()
    with pytest.raises(RuntimeError, match="linear_kl has no second derivative"):
        torch.autograd.grad(once, leaves[:1], create_graph=True)


@pytest.mark.parametrize("top_k", [None, 5])
def test_recomputation_and_compile(top_k: int | None) -> None:
    hidden, weight, other, other_weight = inputs(20, 30)
    mask = torch.arange(20) % 4 != 0

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_kl(x * 1.0, w, other, other_weight, mask=mask, kind="jsd", top_k=top_k).sum() * 2

    def gradients(function: Any) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    expected = gradients(loss)
    again = gradients(lambda *leaves: torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False))
    torch._dynamo.reset()
    compiled = gradients(torch.compile(loss, backend="aot_eager"))
    for mine, recomputed, traced in zip(expected, again, compiled):
        assert mine.count_nonzero() > 0
        assert torch.equal(mine, recomputed)
        torch.testing.assert_close(mine, traced)


@pytest.mark.parametrize("top_k", [None, 2])
def test_strides_and_nothing_to_do(top_k: int | None) -> None:
    hidden, weight, other, other_weight = inputs(12, 20)
    expected = linear_kl(hidden, weight, other, other_weight, top_k=top_k)
    turned = [tensor.t().contiguous().t() for tensor in (hidden, weight, other, other_weight)]
    leaves = [tensor.requires_grad_() for tensor in turned[:2]]
    found = linear_kl(leaves[0].view(3, 4, 6), leaves[1], turned[2].view(3, 4, 9), turned[3], top_k=top_k)
    torch.testing.assert_close(found.detach().reshape(-1), expected)
    assert all(grad.count_nonzero() > 0 for grad in torch.autograd.grad(found.sum(), leaves))
    for mask in (None, torch.zeros(0, dtype=torch.bool)):
        nothing = linear_kl(leaves[0][:0], leaves[1], turned[2][:0], turned[3], top_k=top_k, mask=mask)
        assert nothing.shape == (0,)
        assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(nothing.sum(), leaves))
    ignored = linear_kl(leaves[0], leaves[1], turned[2], turned[3], top_k=top_k, mask=torch.zeros(12, dtype=torch.bool))
    assert ignored.tolist() == [0.0] * 12


LARGE = 151_936


def large(dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, other, other_weight = inputs(7, LARGE, seed=6)
    return [tensor.to(dtype) for tensor in (hidden, weight / 6**0.5, other, other_weight / 3)]


def _large(rank: int, world: int, dtype: torch.dtype, top_k: int | None) -> tuple[Tensor, ...]:
    import torch.distributed as dist

    hidden, weight, other, other_weight = large(dtype)
    leaves = (hidden.requires_grad_(), weight.chunk(world)[rank].clone().requires_grad_())
    here = other_weight[:LARGE].chunk(world)[rank].contiguous()
    found = linear_kl(*leaves, other, here, kind="reverse", top_k=top_k, vocab_size=LARGE - 3, group=dist.group.WORLD)
    return found.detach(), *torch.autograd.grad(found, leaves, torch.linspace(0.5, 2, 7))


@pytest.mark.parametrize("top_k", [None, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_large_vocabulary_over_two_ranks(dtype: torch.dtype, tolerance: float, top_k: int | None) -> None:
    parts = run_distributed(_large, 2, dtype, top_k)
    hidden, weight, other, other_weight = (tensor.double() for tensor in large(dtype))
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    expected = reference((leaves[0] @ leaves[1].t())[:, : LARGE - 3], (other @ other_weight.t())[:, : LARGE - 3], "reverse", 0.5, 1.0, top_k)
    truth = torch.autograd.grad(expected, leaves, torch.linspace(0.5, 2, 7, dtype=torch.float64))
    assert torch.equal(parts[0][0], parts[1][0])
    assert torch.equal(parts[0][1], parts[1][1])
    found = (parts[0][0], parts[0][1], torch.cat([part[2] for part in parts]))
    for mine, exact in zip(found, (expected, *truth)):
        torch.testing.assert_close(mine.double(), exact, atol=tolerance * max(1.0, exact.abs().max().item()), rtol=tolerance)
