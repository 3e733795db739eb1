"""The loss of a linear head against torch's own cross entropy in fp64: smoothing, z-loss, weights, ranks, and what surrounds an operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import choice, extension, linear_softmax
from mswift.kernels.linear_cross_entropy import linear_cross_entropy
from mswift.kernels.linear_log_probs import IGNORE, linear_log_probs
from tests.distributed.harness import run_distributed

CAN_BF16 = extension.available() and extension.isa() in ("avx512_bf16", "amx")


def inputs(tokens: int, width: int, vocab: int, *, padding: int = 0, bias: bool = False, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORE
    return {
        "hidden_states": torch.randn(tokens, width, generator=generator),
        "weight": torch.randn(vocab + padding, width, generator=generator) / width**0.5,
        "labels": labels,
        "bias": torch.randn(vocab + padding, generator=generator) if bias else None,
        "token_weights": torch.randint(0, 3, (tokens,), generator=generator).float(),
    }


def exact(data: dict[str, Any], vocab: int, scale: float, softcap: float | None, smoothing: float, z_loss: float) -> dict[str, Any]:
    """Losses and gradients in fp64, from all logits."""
    leaves = {name: data[name].double().requires_grad_() for name in ("hidden_states", "weight", "bias") if data[name] is not None}
    logits = leaves["hidden_states"] @ leaves["weight"][:vocab].t()
    logits = (logits if data["bias"] is None else logits + leaves["bias"][:vocab]) * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    losses = torch.nn.functional.cross_entropy(logits, data["labels"], ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1).square() * (data["labels"] != IGNORE)
    losses = losses * data["token_weights"]
    upstream = torch.linspace(0.5, 2.0, len(losses), dtype=torch.float64)
    return {"losses": losses.detach(), **dict(zip(leaves, torch.autograd.grad(losses, list(leaves.values()), upstream)))}


def found(data: dict[str, Any], trained: bool = True, **options: Any) -> dict[str, Any]:
    data = {name: tensor.clone() if isinstance(tensor, Tensor) else None for name, tensor in data.items()}
    names = [name for name in ("hidden_states", *(("weight", "bias") if trained else ())) if data[name] is not None]
    for name in names:
        data[name].requires_grad_()
    losses = linear_cross_entropy(**data, **options)
    upstream = torch.linspace(0.5, 2.0, len(losses))
    return {"losses": losses.detach(), **dict(zip(names, torch.autograd.grad(losses, [data[name] for name in names], upstream)))}


def close(some: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    for name, tensor in some.items():
        scale = max(1.0, other[name].abs().max().item()) if other[name].numel() else 1.0
        torch.testing.assert_close(tensor.double(), other[name], atol=tolerance * scale, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 50),
    width=st.sampled_from([1, 2, 7, 24, 64]),
    vocab=st.sampled_from([1, 2, 17, 64, 200, 600]),
    padding=st.sampled_from([0, 5]),
    bias=st.booleans(),
    trained=st.booleans(),
    limits=st.sampled_from([(1.0, None), (0.5, None), (1.0, 3.0), (1.5, 8.0)]),
    smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    compiled=st.booleans(),
    seed=st.integers(0, 100),
)
def test_losses_and_gradients(
    tokens: int,
    width: int,
    vocab: int,
    padding: int,
    bias: bool,
    trained: bool,
    limits: Any,
    smoothing: float,
    z_loss: float,
    compiled: bool,
    seed: int,
) -> None:
    scale, softcap = limits
    data = inputs(tokens, width, vocab, padding=padding, bias=bias, seed=seed)
    options = {"vocab_size": vocab, "logit_scale": scale, "softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss}
    choice.select("auto" if compiled else "reference")
    try:
        result = found(data, trained, **options)
    finally:
        choice.select("auto")
    assert result["losses"].dtype == torch.float32
    assert bool((result["losses"][(data["labels"] == IGNORE) | (data["token_weights"] == 0)] == 0).all())
    close(result, exact(data, vocab, scale, softcap, smoothing, z_loss), 1e-5)


def test_finite_differences_of_log_probs_entropy_and_lse() -> None:
    data = inputs(4, 3, 7, bias=True)
    labels = data["labels"].clamp(min=0)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_log_probs(hidden.float(), weight.float(), labels, bias=bias.float(), softcap=2.0, vocab_size=6, entropy_grad=True))

    labels = labels.clamp(max=5)
    leaves = [data[name].double().requires_grad_() for name in ("hidden_states", "weight", "bias")]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=2e-3, rtol=2e-3, nondet_tol=0.0)
    entropy = function(*leaves)[1]
    logits = torch.tanh((leaves[0] @ leaves[1].t() + leaves[2])[:, :6] / 2) * 2
    torch.testing.assert_close(entropy.double(), torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-5)
    assert not linear_log_probs(leaves[0].float(), leaves[1].float(), labels).entropy.requires_grad


@pytest.mark.skipif(not CAN_BF16, reason="no AVX512-BF16 here")
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("width", [64, 256])  # logits of a third of the tokens are kept for the weight's gradient, or of all
def test_bf16_is_no_worse_than_eager_with_fp32_cross_entropy(confident: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for tokens that the model already knows, whose gradient is the difference of nearly equal terms."""
    monkeypatch.setattr(linear_softmax, "_ROOM", 0)
    data = inputs(192, width, 4160)
    data["token_weights"].fill_(1.0)
    if confident:
        data["hidden_states"] = data["weight"][data["labels"].clamp(min=0)] * 20 + 0.1 * data["hidden_states"]
    data["hidden_states"], data["weight"] = data["hidden_states"].bfloat16(), data["weight"].bfloat16()
    truth, ours = exact(data, 4160, 1.0, None, 0.0, 0.0), found(data)
    hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden_states", "weight"))
    losses = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), data["labels"], ignore_index=IGNORE, reduction="none")
    grads = torch.autograd.grad(losses, (hidden, weight), torch.linspace(0.5, 2.0, 192))
    assert confident == (truth["losses"].mean().item() < 0.1)
    for name, eager in zip(("losses", "hidden_states", "weight"), (losses.detach(), *grads)):
        mine, theirs = ((part.double() - truth[name]).norm().item() for part in (ours[name], eager))
        assert mine <= 1.05 * theirs, name
        assert mine < 3e-3 * truth[name].norm().item(), name


def test_recomputation_autocast_and_compile() -> None:
    data = inputs(20, 16, 130)
    expected = found(data, trained=False)
    hidden = data["hidden_states"].clone().requires_grad_()
    rest = {name: data[name] for name in ("weight", "labels", "token_weights")}
    again = torch.utils.checkpoint.checkpoint(lambda x: linear_cross_entropy(x, **rest), hidden, use_reentrant=False)
    again.backward(torch.linspace(0.5, 2.0, 20))
    assert torch.equal(again.detach(), expected["losses"])
    assert torch.equal(hidden.grad, expected["hidden_states"])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: linear_cross_entropy(x * 1.0, **rest).sum() * 2, backend="aot_eager")
    fresh = data["hidden_states"].clone().requires_grad_()
    compiled(fresh).backward()
    plain = data["hidden_states"].clone().requires_grad_()
    (linear_cross_entropy(plain, **rest).sum() * 2).backward()
    torch.testing.assert_close(fresh.grad, plain.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear_cross_entropy(data["hidden_states"], **rest)
    assert low.dtype == torch.float32
    assert 0 < (low - expected["losses"]).abs().max() < 0.05


def test_leading_dimensions_and_strides() -> None:
    data = inputs(12, 8, 40)
    data["hidden_states"] = data["hidden_states"].view(3, 4, 8).transpose(0, 1)
    data["labels"], data["token_weights"] = (data[name].view(3, 4).t() for name in ("labels", "token_weights"))
    weight = data["weight"].t().contiguous().t()
    losses = linear_cross_entropy(**{**data, "weight": weight})
    assert losses.shape == (4, 3)
    flat = {name: tensor if name == "weight" or tensor is None else tensor.reshape(-1, *tensor.shape[2:]) for name, tensor in data.items()}
    assert torch.equal(losses.reshape(-1), linear_cross_entropy(**flat))
    assert linear_cross_entropy(torch.zeros(0, 8), weight, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_wrong_arguments_are_named() -> None:
    data = inputs(5, 4, 9)
    for change, message in [
        ({"labels": data["labels"][:3]}, r"labels: got \(3,\), wanted \(5,\)"),
        ({"labels": data["labels"].int()}, "labels: got torch.int32, wanted torch.int64"),
        ({"weight": data["weight"][:, :2]}, r"weight: got \(9, 2\), wanted \[vocabulary, 4\]"),
        ({"bias": torch.zeros(3)}, r"bias: got \(3,\), wanted \[9\]"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing: got 1.0"),
        ({"token_weights": torch.ones(2)}, r"token_weights: got \(2,\), wanted \(5,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**{**data, **change})


def _ranks(rank: int, world: int, vocab: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    import torch.distributed as dist

    data = inputs(23, 32, vocab, padding=1, bias=True)
    data["weight"], data["bias"] = (data[name].chunk(world)[rank].contiguous() for name in ("weight", "bias"))
    data["hidden_states"], data["weight"] = data["hidden_states"].to(dtype), data["weight"].to(dtype)
    return found(data, vocab_size=vocab, group=dist.group.WORLD, **options)


@pytest.mark.parametrize("world", [2, 4])
def test_smoothing_of_capped_logits_over_ranks(world: int) -> None:
    options = {"label_smoothing": 0.2, "softcap": 3.0, "logit_scale": 1.5}
    truth = exact(inputs(23, 32, 31, padding=1, bias=True), 31, 1.5, 3.0, 0.2, 0.0)
    parts = run_distributed(_ranks, world, 31, torch.float32, options)
    whole = {name: parts[0][name] for name in ("losses", "hidden_states")}
    assert all(torch.equal(part[name], whole[name]) for part in parts for name in whole), "ranks disagree"
    close(whole | {name: torch.cat([part[name] for part in parts]) for name in ("weight", "bias")}, truth, 1e-5)


def _exchanges(rank: int, world: int, options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the collectives of the forward and of the backward pass."""
    import torch.distributed as dist

    group = dist.group.WORLD
    data = inputs(23, 32, 32)
    hidden = data["hidden_states"].requires_grad_()
    weight = data["weight"].chunk(world)[rank].contiguous().requires_grad_()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as forward:
        total = linear_cross_entropy(hidden, weight, data["labels"], group=group, **options).sum()
    with torch.profiler.profile(activities=activities) as backward:
        total.backward()
    names = [[event.name for event in profile.events() if event.name.startswith("gloo:")] for profile in (forward, backward)]
    return names[0], names[1]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1}])
def test_one_exchange_each_way(options: dict[str, Any]) -> None:
    forward, backward = run_distributed(_exchanges, 2, options)[0]
    assert forward == ["gloo:all_gather"]
    assert backward == ["gloo:all_reduce"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_large_vocabulary_over_ranks(world: int) -> None:
    vocab, options = 151_935, {"label_smoothing": 0.1, "z_loss": 1e-3}
    truth = exact(inputs(23, 32, vocab, padding=1, bias=True), vocab, 1.0, None, 0.1, 1e-3)
    parts = run_distributed(_ranks, world, vocab, torch.float32, options)
    whole = {name: parts[0][name] for name in ("losses", "hidden_states")}
    assert all(torch.equal(part[name], whole[name]) for part in parts for name in whole), "ranks disagree"
    whole |= {name: torch.cat([part[name] for part in parts]) for name in ("weight", "bias")}
    torch.testing.assert_close(whole["losses"].double(), truth["losses"], atol=0, rtol=1e-6)  # so TP1, TP2 and TP4 agree as well
    close(whole, truth, 1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_a_large_vocabulary_over_ranks_in_bf16(world: int) -> None:
    """As close to the exact loss of these bf16 numbers as eager bf16 with fp32 cross entropy is, and the same on all ranks."""
    vocab = 151_935
    data = inputs(23, 32, vocab, padding=1, bias=True)
    data["hidden_states"], data["weight"] = data["hidden_states"].bfloat16(), data["weight"].bfloat16()
    truth = exact(data, vocab, 1.0, None, 0.0, 0.0)
    parts = run_distributed(_ranks, world, vocab, torch.bfloat16, {})
    whole = {name: parts[0][name] for name in ("losses", "hidden_states")}
    assert all(torch.equal(part[name], whole[name]) for part in parts for name in whole), "ranks disagree"
    whole |= {name: torch.cat([part[name] for part in parts]) for name in ("weight", "bias")}
    leaves = {name: data[name].clone().requires_grad_() for name in ("hidden_states", "weight", "bias")}
    logits = (leaves["hidden_states"] @ leaves["weight"][:vocab].t()).float() + leaves["bias"][:vocab]
    losses = torch.nn.functional.cross_entropy(logits, data["labels"], ignore_index=IGNORE, reduction="none") * data["token_weights"]
    grads = torch.autograd.grad(losses, list(leaves.values()), torch.linspace(0.5, 2.0, 23))
    for name, eager in {"losses": losses.detach(), **dict(zip(leaves, grads))}.items():
        mine, theirs = ((part.double() - truth[name]).norm().item() for part in (whole[name], eager))
        allowed = 1.05 if name != "hidden_states" else 1.05 * world**0.5  # each rank rounds its part
        assert mine <= allowed * theirs + 1e-6 * truth[name].norm().item(), name
        assert mine < 1e-2 * truth[name].norm().item(), name


def _extreme(vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    data = inputs(23, 32, vocab, bias=True)
    data["token_weights"].fill_(1.0)
    data["hidden_states"], data["weight"] = (data["hidden_states"] * 4000).to(dtype), data["weight"].to(dtype)
    return data


def _extreme_ranks(rank: int, world: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    import torch.distributed as dist

    data = _extreme(vocab, dtype)
    data["weight"], data["bias"] = (data[name].chunk(world)[rank].contiguous() for name in ("weight", "bias"))
    return found(data, group=dist.group.WORLD if world > 1 else None)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if CAN_BF16 else [])])
def test_extreme_logits_over_ranks(world: int, dtype: torch.dtype) -> None:
    data = _extreme(1200, dtype)
    truth = exact(data, 1200, 1.0, None, 0.0, 0.0)
    largest = (data["hidden_states"].double() @ data["weight"].double().t()).abs().max().item()
    assert largest > 1e4
    parts = run_distributed(_extreme_ranks, world, 1200, dtype)
    whole = {name: parts[0][name] for name in ("losses", "hidden_states")}
    whole |= {name: torch.cat([part[name] for part in parts]) for name in ("weight", "bias")}
    ulp = 2e-7 * largest  # of the products, which are rounded to fp32
    torch.testing.assert_close(whole["losses"].double(), truth["losses"], atol=4 * ulp, rtol=1e-6)
    for name in ("hidden_states", "weight", "bias"):
        error = (whole[name].double() - truth[name]).norm().item()
        assert error < (8 * ulp + (0.0 if dtype == torch.float32 else 1e-2)) * truth[name].norm().item(), name
