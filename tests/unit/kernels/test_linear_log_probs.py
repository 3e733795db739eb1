"""The fused log-probability against the plain one in fp64: values, both gradients, padding, chunks, a vocabulary that is spread over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import extension
from mswift.kernels import linear_log_probs as face
from mswift.kernels import linear_softmax as module
from mswift.kernels.linear_log_probs import IGNORE, linear_log_probs
from tests.distributed.harness import run_distributed

Result = tuple[Tensor, Tensor, Tensor]  # values, gradient of the hidden states, gradient of the weight


def inputs(tokens: int, hidden: int, vocab: int, *, padding: int = 0, ignored: float = 0.3, scale: float = 1.0, seed: int = 0) -> Any:
    """(hidden states, weight, labels, upstream gradient); rows of the weight from `vocab` on are padding, and not zero."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator) * scale
    weight = torch.randn(vocab + padding, hidden, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return states, weight, labels, torch.randn(tokens, generator=generator)


def reference(
    states: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, vocab: int, factor: float = 1.0, softcap: float | None = None
) -> Result:
    """By log_softmax over all logits, in fp64."""
    states, weight = states.double().requires_grad_(), weight.double().requires_grad_()
    logits = (states @ weight[:vocab].t()) * factor
    log_probs = (logits if softcap is None else torch.tanh(logits / softcap) * softcap).log_softmax(-1)
    values = log_probs.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).masked_fill(labels == IGNORE, 0.0)
    grads = torch.autograd.grad(values, (states, weight), upstream.double())
    return values.detach(), *grads


def compute(
    states: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, *, trained: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    states, weight = states.clone().requires_grad_(), weight.clone().requires_grad_(trained)
    values = linear_log_probs(states, weight, labels, **options).log_probs
    values.backward(upstream)
    assert states.grad is not None
    return values.detach(), states.grad, weight.grad


def assert_equal(found: tuple[Tensor, Tensor, Tensor | None], expected: Result, *, trained: bool, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found[0].double(), expected[0], atol=atol, rtol=rtol)
    torch.testing.assert_close(found[1].double(), expected[1], atol=atol, rtol=rtol)
    if trained:
        assert found[2] is not None
        torch.testing.assert_close(found[2].double(), expected[2], atol=atol, rtol=rtol)
    else:
        assert found[2] is None


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 41),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 23),
    padding=st.integers(0, 5),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    trained=st.booleans(),
    chunk=st.sampled_from([1, 2**20]),  # 16 rows at a time, or all
    limits=st.sampled_from([(1.0, None), (0.3, None), (1.0, 2.0), (1.7, 5.0)]),
    seed=st.integers(0, 100),
)
def test_values_and_gradients(
    tokens: int,
    hidden: int,
    vocab: int,
    padding: int,
    ignored: float,
    trained: bool,
    chunk: int,
    limits: tuple[float, float | None],
    seed: int,
) -> None:
    data = inputs(tokens, hidden, vocab, padding=padding, ignored=ignored, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk)
        found = compute(*data, trained=trained, vocab_size=vocab, logit_scale=limits[0], softcap=limits[1])
    assert found[0].dtype == torch.float32
    assert_equal(found, reference(*data, vocab, *limits), trained=trained)
    assert bool((found[0][data[2] == IGNORE] == 0).all())
    if trained:
        assert found[2] is not None
        assert bool((found[2][vocab:] == 0).all()), "padding has a gradient"


@pytest.mark.parametrize("trained", [True, False])
def test_all_tokens_ignored(trained: bool) -> None:
    found = compute(*inputs(7, 5, 11, ignored=1.0), trained=trained)
    assert found[0].tolist() == [0.0] * 7
    assert found[1].count_nonzero() == 0
    assert found[2] is None or found[2].count_nonzero() == 0


@pytest.mark.parametrize("trained", [True, False])
def test_extreme_logits_neither_overflow_nor_lose_the_answer(trained: bool) -> None:
    data = inputs(12, 16, 31, scale=2500.0, ignored=0.1)
    logits = data[0] @ data[1].t()
    assert logits.abs().max() > 1e4
    found = compute(*data, trained=trained)
    expected = reference(*data, 31)
    assert all(part is None or bool(part.isfinite().all()) for part in found)
    assert_equal(found, expected, trained=trained, rtol=1e-5, atol=2e-2)  # a logit of 1e4 has an ulp of 1e-3 in fp32


@pytest.mark.parametrize("trained", [True, False])
def test_bf16(trained: bool) -> None:
    states, weight, labels, upstream = inputs(33, 24, 57, padding=7, seed=3)
    data = (states.bfloat16(), weight.bfloat16() * 0.25, labels, upstream)
    found = compute(*data, trained=trained, vocab_size=57)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.bfloat16
    assert_equal(found, reference(*data, 57), trained=trained, atol=3e-2, rtol=2e-2)


def test_batched_shapes_and_strided_hidden_states() -> None:
    states, weight, labels, upstream = inputs(24, 6, 13, seed=5)
    expected = reference(states, weight, labels, upstream, 13)
    turned = states.view(4, 6, 6).transpose(0, 1).detach().requires_grad_()  # [s, b, h] that is not contiguous
    values = linear_log_probs(turned, weight, labels.view(4, 6).t()).log_probs
    assert values.shape == (6, 4)
    values.backward(upstream.view(4, 6).t())
    torch.testing.assert_close(values.t().reshape(-1).double(), expected[0], atol=1e-5, rtol=1e-5)
    assert turned.grad is not None
    torch.testing.assert_close(turned.grad.transpose(0, 1).reshape(24, 6).double(), expected[1], atol=1e-5, rtol=1e-5)


def test_the_gradient_may_be_asked_for_twice() -> None:
    states, weight, labels, upstream = inputs(9, 4, 10)
    states.requires_grad_()
    values = linear_log_probs(states, weight, labels).log_probs
    first = torch.autograd.grad(values, states, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(values, states, 2 * upstream)[0]
    torch.testing.assert_close(second, 2 * first)
    assert first.count_nonzero() > 0


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the memory in which logits were kept, and -1 for each time that they were used."""
    if not extension.available():
        pytest.skip("the compiled kernels are not built")
    seen: list[int] = []
    monkeypatch.setattr(module, "_ROOM", 0)  # so that of some tokens nothing is kept
    keep, use = face.keeping_statistics, face.kept_weight_gradient

    def keeping(*args: Any) -> Any:
        found = keep(*args)
        seen.append(found[1].memory.data_ptr())
        return found

    def using(*args: Any) -> Any:
        seen.append(-1)
        return use(*args)

    monkeypatch.setattr(face, "keeping_statistics", keeping)
    monkeypatch.setattr(face, "kept_weight_gradient", using)
    return seen


@pytest.mark.parametrize("width", [64, 128])
def test_the_gradient_of_a_weight_may_be_asked_for_twice(kept: list[int], width: int) -> None:
    """Kept logits are there once; the second pass computes them again and leaves the first one's gradient alone, which lies in their memory."""
    states, weight, labels, upstream = inputs(90, width, 600, padding=3)
    expected = reference(states, weight, labels, upstream, 600)
    states.requires_grad_(), weight.requires_grad_()
    values = linear_log_probs(states, weight, labels, vocab_size=600).log_probs
    values.backward(upstream, retain_graph=True)
    assert weight.grad is not None
    assert states.grad is not None
    assert kept == [weight.grad.data_ptr(), -1], "the gradient was copied, or is elsewhere"
    first = weight.grad.clone()
    torch.testing.assert_close(first.double(), expected[2], atol=1e-5, rtol=1e-5)
    taken, weight.grad = weight.grad, None
    again = torch.autograd.grad(values, (states, weight), 2 * upstream, retain_graph=True)
    torch.testing.assert_close(again[1].double(), 2 * expected[2], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(again[0].double(), 2 * expected[1], atol=2e-5, rtol=1e-5)
    assert torch.equal(taken, first), "a gradient that was handed out has changed"
    taken.fill_(torch.nan)
    values.backward(upstream)
    torch.testing.assert_close(weight.grad, first, atol=1e-6, rtol=1e-5)
    assert len(kept) == 2


def test_gradients_of_several_losses_are_added(kept: list[int]) -> None:
    states, weight, labels, upstream = inputs(90, 64, 300)
    expected = reference(states, weight, labels, upstream, 300)[2]
    weight.requires_grad_()
    losses = [linear_log_probs(states, weight, labels).log_probs @ upstream for _ in range(3)]
    (losses[0] + losses[1]).backward()
    losses[2].backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), 3 * expected, atol=3e-5, rtol=1e-5)
    assert sorted(kept)[:3] == [-1] * 3
    assert len(set(kept)) == 4


def test_checkpointing_recomputes_kept_logits(kept: list[int]) -> None:
    states, weight, labels, upstream = inputs(90, 64, 300)
    expected = reference(states, weight, labels, upstream, 300)
    states.requires_grad_(), weight.requires_grad_()
    for reentrant in (False, True):
        states.grad = weight.grad = None
        values = torch.utils.checkpoint.checkpoint(lambda x, w: linear_log_probs(x, w, labels).log_probs, states, weight, use_reentrant=reentrant)
        values.backward(upstream)
        assert_equal((values.detach(), states.grad, weight.grad), expected, trained=True)
    assert kept.count(-1) == 2


def test_logits_are_kept_only_for_a_gradient_that_they_give(kept: list[int]) -> None:
    states, weight, labels, upstream = inputs(90, 64, 300)
    trained = weight.clone().requires_grad_()
    bias = torch.zeros(300, requires_grad=True)
    with torch.no_grad():
        linear_log_probs(states.requires_grad_(), trained, labels)
    linear_log_probs(states, weight, labels)
    linear_log_probs(states, weight, labels, bias=bias)
    linear_log_probs(states, trained, labels, softcap=3.0)
    linear_log_probs(states, trained, labels, entropy_grad=True)
    assert not kept
    values = linear_log_probs(states.detach(), trained, labels, bias=bias).log_probs
    found = torch.autograd.grad(values, (trained, bias), upstream)
    torch.testing.assert_close(found[0].double(), reference(states.detach(), weight, labels, upstream, 300)[2], atol=1e-5, rtol=1e-5)
    assert found[1].abs().max() > 0.1
    assert kept[1:] == [-1]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: (linear_log_probs(x, w, labels).log_probs * upstream).sum(), backend="aot_eager")
    graph = torch.autograd.grad(compiled(states, trained), trained)[0]
    torch.testing.assert_close(graph, found[0], atol=1e-5, rtol=1e-5)
    assert len(kept) == 2


def _parallel(rank: int, world: int, cases: list[tuple[dict[str, Any], int, bool, bool]]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    import torch.distributed as dist

    results = []
    for options, vocab, trained, reduce_grad in cases:
        states, weight, labels, upstream = inputs(vocab=vocab, **options)
        shard = weight.chunk(world)[rank]
        kwargs = {"vocab_size": vocab, "group": dist.group.WORLD, "reduce_grad": reduce_grad}
        results.append(compute(states, shard, labels, upstream, trained=trained, **kwargs))
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_a_vocabulary_over_several_ranks(world: int) -> None:
    """The last ranks may hold some padding, or nothing else."""
    sizes = [
        {"tokens": 19, "hidden": 6, "padding": 3},
        {"tokens": 1, "hidden": 3, "padding": 8, "ignored": 0.0},
        {"tokens": 5, "hidden": 4, "padding": 3, "ignored": 1.0},
        {"tokens": 90, "hidden": 64, "padding": 1},
    ]
    vocabs = [29, 8, 13, 203]
    cases = [(size, vocab, trained, reduce) for size, vocab in zip(sizes, vocabs) for trained in (True, False) for reduce in (True, False)]
    ranks = run_distributed(_parallel, world, cases)
    for case, (options, vocab, trained, reduce) in enumerate(cases):
        data = inputs(vocab=vocab, **options)
        expected = reference(*data, vocab)
        parts = [rank[case] for rank in ranks]
        if not reduce:
            whole = torch.stack([part[1] for part in parts]).sum(0)
            parts = [(part[0], whole, part[2]) for part in parts]
        for rank, part in enumerate(parts):
            assert_equal(part, (*expected[:2], expected[2].chunk(world)[rank]), trained=trained)
            assert torch.equal(part[0], parts[0][0]), "ranks disagree"
