"""What is asked of every operator alike: torch's own checks, graphs of torch.compile, recomputation, autocast, strides, nothing at all, threads.

`FACES` are the functions that the rest of mswift calls, `SCHEMAS` the compiled operators beneath them; one that is missing here fails a test.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mswift.kernels import choice, extension
from mswift.kernels import linear_log_probs as linear_log_probs_face
from mswift.kernels.elementwise import GELU_TANH, Gate, add_rms_norm, gated_activation, rms_norm, rotate, rotate_
from mswift.kernels.grouped_linear import grouped_linear, lora_grouped_linear
from mswift.kernels.linear_cross_entropy import linear_cross_entropy
from mswift.kernels.linear_kl import linear_kl
from mswift.kernels.linear_log_probs import linear_log_probs
from mswift.kernels.lora_linear import dropout_of, lora_linear
from mswift.kernels.packed_attention import packed_attention
from mswift.kernels.permute import permute, unpermute
from mswift.kernels.quantised_linear import quantise_int8, quantise_nf4, quantised_linear
from tests.unit.kernels.emulated import relative

pytestmark = [
    pytest.mark.usefixtures("auto_kernels"),
    pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the compiled kernels are not there, or take no bfloat16 here"),
]
BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = 12


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table_of(tokens: int, half: int) -> Tensor:
    angles = draw(tokens, half, seed=5)
    return torch.stack((angles.cos(), angles.sin()))


def counts_of(tokens: int) -> Tensor:
    return torch.tensor([tokens // 3, 0, tokens - tokens // 3])


class Case(NamedTuple):
    """A call with its differentiable inputs, in fp32."""

    call: Callable[..., Tensor]
    inputs: list[Tensor]


def _rotation(tokens: int) -> Case:
    table = table_of(tokens, 6)
    return Case(lambda x: rotate(x, table, interleaved=False), [draw(tokens, 2, 3, 16)])


def _rotation_in_place(tokens: int) -> Case:
    table = table_of(tokens, 8)
    return Case(lambda x: rotate_(x * 1.0, table, width=16, each=3, turned=2, interleaved=True), [draw(tokens, 2, 96)])


def _attention(tokens: int, **limits: Any) -> Case:
    bounds = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    inputs = [draw(tokens, 6, 16), draw(tokens, 3, 16, seed=1), draw(tokens, 3, 32, seed=2)]
    if limits:
        return Case(lambda q, k, v, sinks: packed_attention(q, k, v, bounds, sinks=sinks, **limits), [*inputs, draw(6, seed=3)])
    return Case(lambda q, k, v: packed_attention(q, k, v, bounds), inputs)


def _head(tokens: int) -> tuple[Tensor, list[Tensor]]:
    labels = torch.arange(tokens) * 5
    return torch.where(torch.arange(tokens) % 3 == 1, -100, labels), [draw(tokens, 32), draw(1600, 32, seed=1), draw(1600, seed=2)]


def _cross_entropy(tokens: int) -> Case:
    labels, inputs = _head(tokens)
    return Case(lambda x, w, b: linear_cross_entropy(x, w, labels, bias=b, label_smoothing=0.1, z_loss=0.01), inputs)


def _frozen_head(tokens: int) -> Case:
    labels, (x, weight, _) = _head(tokens)
    return Case(lambda x: linear_cross_entropy(x, weight.to(x.dtype), labels, softcap=5.0), [x])


def _log_probs(tokens: int) -> Case:
    labels, inputs = _head(tokens)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        scores = linear_log_probs(x, w, labels, bias=b, entropy_grad=True)
        return torch.stack((scores.log_probs, scores.entropy))

    return Case(call, inputs)


def _kl(tokens: int) -> Case:
    teacher = draw(tokens, 1600, seed=7)
    return Case(lambda x, w: linear_kl(x, w, teacher_logits=teacher, kind="jsd", temperature=2.0), _head(tokens)[1][:2])


def _lora(tokens: int) -> Case:
    weight = draw(48, 32, seed=3)
    call = lambda x, a, b: lora_linear(x, weight.to(x.dtype), None, a, b, scale=0.5, dropout_p=0.25, seed=3)  # noqa: E731
    return Case(call, [draw(tokens, 2, 32), draw(4, 32, seed=1), draw(48, 4, seed=2)])


def _grouped(tokens: int) -> Case:
    counts = counts_of(tokens)
    return Case(lambda x, w, b: grouped_linear(x, w, counts, b), [draw(tokens, 32), draw(3, 48, 32, seed=1), draw(3, 48, seed=2)])


def _lora_grouped(tokens: int) -> Case:
    weights, seeds, counts = draw(3, 48, 32, seed=3), torch.arange(3), counts_of(tokens)

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_grouped_linear(x, weights.to(x.dtype), counts, None, a, b, scale=0.5, dropout_p=0.25, seeds=seeds)

    return Case(call, [draw(tokens, 32), draw(3, 4, 32, seed=1), draw(3, 48, 4, seed=2)])


def _quantised(tokens: int, quantise: Callable[[Tensor], Any]) -> Case:
    weight = quantise(draw(80, 64, seed=3).to(BF16))
    call = lambda x, bias, a, b: quantised_linear(x, weight, bias, a, b, scale=0.5, dropout_p=0.25, seed=3)  # noqa: E731
    return Case(call, [draw(tokens, 2, 64), draw(80, seed=4), draw(4, 64, seed=1), draw(80, 4, seed=2)])


def _experts(tokens: int) -> Case:
    places = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(1)).view(tokens, 2)
    return Case(lambda x, mix: unpermute(permute(x, places, 2 * tokens) * 2.0, places, mix.float()), [draw(tokens, 24), draw(tokens, 2, seed=1)])


FACES: dict[str, Callable[[int], Case]] = {
    "rms_norm": lambda n: Case(lambda x, w: rms_norm(x, w, 1e-3, zero_centred=True), [draw(n, 2, 48), draw(48, seed=1)]),
    "add_rms_norm": lambda n: Case(lambda x, r, w: torch.stack(add_rms_norm(x, r, w, 1e-3)), [draw(n, 48), draw(n, 48, seed=2), draw(48, seed=1)]),
    "gated_activation": lambda n: Case(lambda x: gated_activation(x, GELU_TANH), [draw(n, 2, 64)]),
    "gated_activation, limited": lambda n: Case(lambda x: gated_activation(x, Gate(slope=1.702, limit=1.0, offset=1.0)), [draw(n, 64)]),
    "rotate": _rotation,
    "rotate_": _rotation_in_place,
    "packed_attention": _attention,
    "packed_attention, limited": lambda n: _attention(n, window=5, chunk=7),
    "linear_cross_entropy": _cross_entropy,
    "linear_cross_entropy, frozen": _frozen_head,
    "linear_log_probs": _log_probs,
    "linear_kl": _kl,
    "lora_linear": _lora,
    "dropout_of": lambda n: Case(lambda x: dropout_of(x, 0.25, 3), [draw(n, 2, 40)]),
    "grouped_linear": _grouped,
    "lora_grouped_linear": _lora_grouped,
    "quantised_linear, nf4": lambda n: _quantised(n, quantise_nf4),
    "quantised_linear, int8": lambda n: _quantised(n, quantise_int8),
    "permute": _experts,
}
PRODUCTS = [name for name in FACES if "linear" in name]  # which torch's own layers compute in the dtype of a surrounding autocast
BROKEN = {name: "how many tokens have labels is not known" for name in FACES if name.startswith(("linear_cross", "linear_log"))}
BROKEN["linear_kl"] = "it says itself that it stays out of graphs"
"""Faces of which torch.compile makes more than one graph, and why."""


def outcome(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Value and gradients."""
    leaves = [part.detach().requires_grad_() for part in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=9, dtype=out.dtype))]


def case_of(name: str, dtype: torch.dtype, tokens: int = TOKENS) -> Case:
    case = FACES[name](tokens)
    return case._replace(inputs=[part.to(dtype) for part in case.inputs])


def agree(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert relative(mine, other) <= limit


every_face = pytest.mark.parametrize("name", FACES)
REFUSED = {"rotate_": "side by side"}
"""What is written to must be laid out as it says; a part of what the error says."""
LIMITS = {FP32: 1e-6, BF16: 4e-3}  # where torch chooses another product for other strides

both_types = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_face
@pytest.mark.usefixtures("fresh")
def test_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between other operations, which the graph must keep in order with it; what the backend does not change is the same to the last bit."""
    monkeypatch.setattr(linear_log_probs_face, "keeps", lambda *_: False)  # a graph computes logits again that are else kept in 16 bits
    case = case_of(name, BF16)

    def around(x: Tensor, *rest: Tensor) -> Tensor:
        return case.call(x * 2, *rest).sin() * 2

    compiled = torch.compile(around, backend="aot_eager", fullgraph=name not in BROKEN)
    agree(outcome(compiled, case.inputs), outcome(around, case.inputs), 0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: inductor cannot compile")
@every_face
@pytest.mark.usefixtures("fresh")
def test_in_a_graph_of_inductor(name: str) -> None:
    case = case_of(name, BF16)

    def around(x: Tensor, *rest: Tensor) -> Tensor:
        return case.call(x * 2, *rest) * 2

    compiled = torch.compile(around, backend="inductor", fullgraph=name not in BROKEN)
    agree(outcome(compiled, case.inputs), outcome(around, case.inputs), 5e-3)


@every_face
@both_types
def test_computed_again_for_the_backward_pass(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype)
    again = outcome(lambda *inputs: checkpoint(case.call, *inputs, use_reentrant=False), case.inputs)
    agree(again, outcome(case.call, case.inputs), 0.0)


@every_face
def test_under_autocast(name: str) -> None:
    """Products in its dtype, as torch's own; the others in that of what they are given. Gradients have the dtype of what they belong to."""
    case = case_of(name, FP32)

    def within(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return case.call(*inputs)

    found = outcome(within, case.inputs)
    narrow = case_of(name, BF16) if name in PRODUCTS else case
    wanted = outcome(narrow.call, narrow.inputs)
    assert found[0].dtype == wanted[0].dtype
    agree(found[1:], [part.float() for part in wanted[1:]], 0.0)
    assert torch.equal(found[0], wanted[0])


@every_face
@both_types
def test_any_strides(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype)
    spread = [torch.stack((part, part), -1)[..., 0] for part in case.inputs]
    turned = [part.movedim(0, -1).contiguous().movedim(-1, 0) for part in case.inputs]
    assert not spread[0].is_contiguous()
    assert not turned[0].is_contiguous()
    wanted = outcome(case.call, case.inputs)
    agree(outcome(case.call, spread), wanted, LIMITS[dtype])
    if name in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[name]):
            outcome(case.call, turned)
    else:
        agree(outcome(case.call, turned), wanted, LIMITS[dtype])


@every_face
@both_types
def test_no_tokens(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype, 0)
    found = outcome(case.call, case.inputs)
    assert found[0].numel() == 0
    assert found[0].shape == tuple(0 if size == TOKENS else size for size in case_of(name, dtype).call(*case_of(name, dtype).inputs).shape)
    for gradient, part in zip(found[1:], case.inputs, strict=True):
        assert gradient.shape == part.shape
        assert not gradient.any()


@every_face
@both_types
def test_the_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype, 300)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outcome(case.call, case.inputs))
    finally:
        torch.set_num_threads(before)
    agree(found[1], found[0], 0.0)
    agree(found[2], found[0], 0.0)


# ---- the compiled operators ------------------------------------------------------------------------------------------------------------

_NONE, _MASK = [0] * 5, [64, 3, 0, 0, 32]


def _of_attention(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    q, k, v = draw(9, 2, 4, 16, dtype=dtype), draw(9, 2, 2, 16, seed=1, dtype=dtype), draw(9, 2, 2, 32, seed=2, dtype=dtype)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    for query in (q, q.unflatten(2, (2, 2))):
        yield "causal_attention", (query.detach().requires_grad_(), k, v, bounds, None, 0.25, 3, 0)
        out, lse = torch.ops.mswift.causal_attention(query.detach(), k, v, bounds, None, 0.25, 3, 0)
        yield "causal_attention_backward", (out + 1, query.detach(), k, v, out, lse, bounds, 0.25, 3, 0)


def _between(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, weight = draw(3, 2, 2, 8, dtype=dtype), draw(8, seed=1, dtype=dtype)
    y, rstd = torch.ops.mswift.rms_norm(x, weight, 1e-5, True)
    y = y.detach()
    yield "rms_norm", (x.requires_grad_(), weight.requires_grad_(), 1e-5, True)
    yield "add_rms_norm", (x, x.detach().flip(0), weight, 1e-5, False)
    yield "rms_norm_backward", (y, None, x.detach(), weight.detach(), rstd, True, True)
    yield "rms_norm_backward", (y, y, x.detach(), weight.detach(), rstd, False, False)
    yield "gated_activation", (x, 1.0, 0.0, 7.0, 0.5)
    yield "gated_activation_backward", (y[..., :4], x.detach(), 1.0, 0.0, 7.0, 0.5)
    yield "rotate", (x, table_of(3, 3), False, False)
    yield "rotate_", (x.clone(), table_of(3, 3), 8, 2, 1, False, False)
    yield "rotate_", (x.detach().clone(), table_of(3, 4), 8, 1, 1, True, True)


def _of_the_head(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    hidden, weight, bias = draw(9, 12, dtype=dtype), draw(70, 12, seed=1, dtype=dtype), draw(70, seed=2, dtype=dtype)
    labels = torch.arange(9) * 8 - 1
    for level in (0, 1, 2):
        yield "linear_softmax", (hidden, weight, bias, labels, 68, 1.0, 0.0, level)
    yield "linear_softmax_grad_weight", (hidden, weight, None, labels, torch.ones(4, 9), 68, 1.0, 4.0)
    hidden, weight, labels = draw(128, 64, dtype=dtype), draw(70, 64, seed=1, dtype=dtype) / 16, torch.arange(128) % 71 - 1
    keeping = (hidden, weight, None, labels, 70, 1.0, True, 64 * 70 * dtype.itemsize)  # sizes that leave nothing of the memory unwritten
    yield "linear_softmax_keeping", keeping
    kept = torch.ops.mswift.linear_softmax_keeping(*keeping)[2:]
    yield "linear_softmax_grad_weight_kept", (hidden, weight, None, labels, torch.ones(4, 128), *kept, 70, 1.0)


def _of_adapters(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, weight, a, b = draw(9, 32, dtype=dtype), draw(48, 32, seed=1, dtype=dtype), draw(4, 32, seed=2, dtype=dtype), draw(48, 4, seed=3, dtype=dtype)
    grad, low = draw(9, 48, seed=4, dtype=dtype), draw(9, 4, seed=5, dtype=dtype)
    for factor, ids, adapters in ((None, None, 1), (draw(48, seed=6), torch.arange(9) % 3 - 1, 2)):
        yield "lora_linear", (x, weight, None, a, b, factor, ids, adapters, 0.5, _MASK)
        yield "lora_linear_grad_input", (grad, weight, a, b, factor, ids, adapters, 0.5, _MASK, True)
        yield "lora_linear_grad_factors", (grad, x, low, low, factor, grad, _MASK)
    yield "lora_dropout", (x, _MASK)


def _of_groups() -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, low, counts = draw(9, 32, dtype=BF16), draw(9, 4, seed=5, dtype=BF16), torch.tensor([4, 0, 5])
    weights, up = (list(draw(3, 48, columns, seed=1, dtype=BF16)) for columns in (32, 4))
    yield "grouped_product", (x, weights, counts, [], low, up, False, 0.5, None, 0, 0, 0)
    yield "grouped_outer", (low, x, counts, torch.arange(3), 26, 0, 32)
    for block, weight in ((64, quantise_nf4(draw(48, 32, dtype=BF16))), (0, quantise_int8(draw(48, 32, dtype=BF16)))):
        yield "quantised_product", (x, weight.codes, weight.magnitudes, 48, 32, block, None, low, up[0], False, _NONE)


def samples(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    parts = [_of_attention(dtype), _between(dtype), _of_the_head(dtype), _of_adapters(dtype), *([_of_groups()] if dtype == BF16 else [])]
    return [sample for part in parts for sample in part]


def test_every_operator_is_here() -> None:
    source = (Path(__file__).parents[3] / "csrc" / "ops.cpp").read_text(encoding="utf8")
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', source))
    for_devices = {"gather_rows", "combine_rows", "combine_rows_backward"}  # of which tests/unit/kernels/test_cuda_operators.py has the checks
    assert {name for name, _ in samples(BF16)} == defined - for_devices - {"isa", "built_for"}
    assert {face.split(",")[0] for face in FACES} >= {name for name, *_ in choice.table()} - {"attention"}


@both_types
def test_what_torch_checks_of_an_operator(dtype: torch.dtype) -> None:
    for name, arguments in samples(dtype):
        report = torch.library.opcheck(getattr(torch.ops.mswift, name).default, arguments)
        assert set(report.values()) == {"SUCCESS"}, name
