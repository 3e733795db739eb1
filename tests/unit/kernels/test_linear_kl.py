"""Divergences of two heads against torch's own in fp64: kinds, the likeliest tokens, chunks, teachers of another size."""

from __future__ import annotations

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
        return torch.nn.functional.kl_div(b.log(), a, reduction="none").sum(-1)

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
    ]:
        with pytest.raises(ValueError, match=message):
            linear_kl(hidden, weight, **kwargs)


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
