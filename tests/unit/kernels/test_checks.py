"""What does not fit together is refused by every face, whether its kernel or plain torch would run, with the face's own name for the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.kernels import checks, choice, extension
from mswift.kernels.causal_attention import causal_attention
from mswift.kernels.elementwise import SILU, Gate, add_rms_norm, gated_activation, rms_norm, rotate, rotate_
from mswift.kernels.grouped_linear import grouped_linear, lora_grouped_linear
from mswift.kernels.linear_cross_entropy import linear_cross_entropy
from mswift.kernels.linear_log_probs import linear_log_probs
from mswift.kernels.lora_linear import dropout_of, lora_linear
from mswift.kernels.packed_attention import packed_attention
from mswift.kernels.permute import permute, unpermute
from mswift.kernels.quantised_linear import QuantisedWeight, quantise_int8, quantise_nf4, quantised_linear

BF16 = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


X, W, A, B = draw(4, 16), draw(12, 16), draw(2, 16), draw(12, 2)
LORA = {"x": X, "weight": W, "bias": draw(12), "lora_a": A, "lora_b": B, "scale": 0.5}
SEVERAL = {**LORA, "lora_a": draw(2, 2, 16), "lora_b": draw(2, 12, 2), "adapter_ids": ints(0, 1, -1, 0)}
EXPERTS = {"x": X, "weights": draw(2, 12, 16), "tokens_per_expert": ints(1, 3), "biases": draw(2, 12)}
ADAPTED = {**EXPERTS, "lora_a": draw(2, 2, 16), "lora_b": draw(2, 12, 2), "scale": 0.5}
CODES, NIBBLES = quantise_int8(W), quantise_nf4(draw(8, 16), 16)
PACKED = {"x": X.to(BF16), "weight": CODES, "bias": draw(12, dtype=BF16), "lora_a": A.to(BF16), "lora_b": B.to(BF16)}
HEAD = {"hidden_states": X, "weight": draw(40, 16), "labels": ints(1, -100, 39, 0)}
ROWS = {"query": draw(8, 4, 16), "key": draw(8, 2, 16), "value": draw(8, 2, 32), "cu_seqlens": ints(0, 3, 8)}
SQUARE = {"query": draw(8, 1, 4, 16), "key": draw(8, 1, 2, 16), "value": draw(8, 1, 2, 32), "bounds": ints(0, 3, 8)}
NORM = {"x": X, "weight": draw(16), "eps": 1e-5}
ROTATED = {"x": draw(4, 1, 2, 16), "table": draw(2, 4, 8), "interleaved": False}
FUSED = {"x": draw(4, 1, 96), "table": draw(2, 4, 8), "width": 16, "each": 3, "turned": 2, "interleaved": False}
PLACES = {"x": X, "places": torch.arange(8).view(4, 2), "rows": 8}
BACK = {"x": draw(8, 16), "places": torch.arange(8).view(4, 2), "weights": draw(4, 2)}
CASES: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = [
    (lora_linear, LORA, {"x": X[:, :7]}, r"x: got float32 \[4, 7\], wanted \[4, 16\]"),
    (lora_linear, LORA, {"x": X.to(BF16)}, r"weight: got float32 \[12, 16\], wanted bfloat16 \[12, 16\]"),
    (lora_linear, LORA, {"weight": W[0]}, r"weight: got float32 \[16\], wanted \[out, in\]"),
    (lora_linear, LORA, {"bias": draw(1)}, r"bias: got float32 \[1\], wanted float32 \[12\]"),
    (lora_linear, LORA, {"lora_a": A[:, :3]}, r"lora_a: got float32 \[2, 3\], wanted float32 \[2, 16\]"),
    (lora_linear, LORA, {"lora_a": A.to(BF16)}, r"lora_a: got bfloat16 \[2, 16\], wanted float32"),
    (lora_linear, LORA, {"lora_b": B[:, :1]}, r"lora_b: got float32 \[12, 1\], wanted float32 \[12, 2\]"),
    (lora_linear, LORA, {"factor": draw(1)}, r"factor: got float32 \[1\], wanted float32 \[12\]"),
    (lora_linear, LORA, {"factor": draw(12, dtype=BF16)}, r"factor: got bfloat16 \[12\], wanted float32 \[12\]"),
    (lora_linear, LORA, {"dropout_p": 1.0}, r"dropout_p: got 1\.0, wanted at least 0 and less than 1"),
    (lora_linear, LORA, {"dropout_p": 0.1, "first_column": -1}, "first_column: got -1, wanted at least 0"),
    (lora_linear, SEVERAL, {"adapter_ids": ints(0, 1, 7, 0)}, "adapter_ids: got 7, wanted -1 to 1"),
    (lora_linear, SEVERAL, {"adapter_ids": ints(0, 1, -5, 0)}, "adapter_ids: got -5, wanted -1 to 1"),
    (lora_linear, SEVERAL, {"adapter_ids": ints(0, 1)}, r"adapter_ids: got int64 \[2\], wanted int64 \[4\]"),
    (lora_linear, SEVERAL, {"adapter_ids": ints(0, 1, -1, 0).int()}, r"adapter_ids: got int32 \[4\], wanted int64"),
    (lora_linear, SEVERAL, {"lora_a": A}, r"lora_a: got float32 \[2, 16\], wanted float32 \[2, 16, 16\]"),
    (lora_linear, SEVERAL, {"lora_b": draw(3, 12, 2)}, r"lora_b: got float32 \[3, 12, 2\], wanted float32 \[2, 12, 2\]"),
    (dropout_of, {"x": X, "p": 0.1, "seed": 1}, {"p": 1.2}, r"dropout_p: got 1\.2"),
    (dropout_of, {"x": X, "p": 0.1, "seed": 1}, {"first_column": -2}, "first_column: got -2"),
    (grouped_linear, EXPERTS, {"x": X[None]}, r"x: got float32 \[1, 4, 16\], wanted \[1, 16\]"),
    (grouped_linear, EXPERTS, {"x": X[:, :7]}, r"x: got float32 \[4, 7\], wanted \[4, 16\]"),
    (grouped_linear, EXPERTS, {"x": X.to(BF16)}, r"weights\[0\]: got float32 \[12, 16\], wanted bfloat16"),
    (grouped_linear, EXPERTS, {"weights": [W, W[:3]]}, r"weights\[1\]: got float32 \[3, 16\], wanted float32 \[12, 16\]"),
    (grouped_linear, EXPERTS, {"weights": []}, r"weights: got \[\], wanted \[out, in\] for each expert"),
    (grouped_linear, EXPERTS, {"biases": draw(2, 3)}, r"biases\[0\]: got float32 \[3\], wanted \[12\]"),
    (grouped_linear, EXPERTS, {"biases": draw(1, 12)}, "biases: got 1, wanted 2, one for each of weights"),
    (grouped_linear, EXPERTS, {"tokens_per_expert": ints(4)}, r"tokens_per_expert: got int64 \[1\], wanted \[2\]"),
    (
        grouped_linear,
        EXPERTS,
        {"tokens_per_expert": ints(2, 1)},
        r"tokens_per_expert: got \[2, 1\], wanted numbers from 0 that add up to the rows of x, 4",
    ),
    (grouped_linear, EXPERTS, {"tokens_per_expert": ints(5, -1)}, r"tokens_per_expert: got \[5, -1\], wanted numbers from 0"),
    (grouped_linear, EXPERTS, {"tokens_per_expert": draw(2)}, r"tokens_per_expert: got float32 \[2\], wanted whole numbers"),
    (lora_grouped_linear, ADAPTED, {"lora_b": draw(1, 12, 2)}, "lora_b: got 1, wanted 2, one for each of weights"),
    (lora_grouped_linear, ADAPTED, {"lora_b": draw(2, 3, 2)}, r"lora_b\[0\]: got float32 \[3, 2\], wanted float32 \[12, 2\]"),
    (lora_grouped_linear, ADAPTED, {"lora_a": draw(2, 2, 7)}, r"lora_a\[0\]: got float32 \[2, 7\], wanted float32 \[2, 16\]"),
    (lora_grouped_linear, ADAPTED, {"dropout_p": 1.5, "seeds": ints(1, 2)}, r"dropout_p: got 1\.5"),
    (lora_grouped_linear, ADAPTED, {"dropout_p": 0.1}, r"seeds: got none, wanted int64 \[experts\]"),
    (lora_grouped_linear, ADAPTED, {"dropout_p": 0.1, "seeds": ints(1)}, r"seeds: got int64 \[1\], wanted int64 \[2\]"),
    (lora_grouped_linear, ADAPTED, {"dropout_p": 0.1, "seeds": ints(1, 2), "first_column": -1}, "first_column: got -1"),
    (quantised_linear, PACKED, {"x": X[:, :7].to(BF16)}, r"x: got bfloat16 \[4, 7\], wanted \[4, 16\]"),
    (quantised_linear, PACKED, {"bias": draw(1, dtype=BF16)}, r"bias: got bfloat16 \[1\], wanted bfloat16 \[12\]"),
    (quantised_linear, PACKED, {"lora_a": A}, r"lora_a: got float32 \[2, 16\], wanted bfloat16"),
    (quantised_linear, PACKED, {"lora_a": A[:, :3].to(BF16)}, r"lora_a: got bfloat16 \[2, 3\], wanted bfloat16 \[2, 16\]"),
    (quantised_linear, PACKED, {"lora_b": B[:3].to(BF16)}, r"lora_b: got bfloat16 \[3, 2\], wanted bfloat16 \[12, 2\]"),
    (quantised_linear, PACKED, {"lora_b": None}, "lora_b: wanted together with lora_a"),
    (quantised_linear, PACKED, {"dropout_p": 1.2}, r"dropout_p: got 1\.2"),
    (quantised_linear, PACKED, {"dropout_p": 0.1, "first_column": -3}, "first_column: got -3"),
    (QuantisedWeight, vars(CODES), {"codes": CODES.codes[:3]}, r"codes: got int8 \[3, 16\], wanted int8 for 12 x 16, 192 in all"),
    (QuantisedWeight, vars(CODES), {"scales": CODES.magnitudes[:3]}, "scales: got 3, wanted one a row of 12 x 16"),
    (QuantisedWeight, vars(NIBBLES), {"codes": NIBBLES.codes.char()}, r"codes: got int8 \[64\], wanted uint8 for 8 x 16, 64 in all"),
    (QuantisedWeight, vars(NIBBLES), {"scales": NIBBLES.magnitudes[:1]}, "scales: got 1, wanted one a block of 16 of 8 x 16"),
    *(
        (head, HEAD, wrong, message)
        for head in (linear_log_probs, linear_cross_entropy)
        for wrong, message in (
            ({"labels": ints(1, -100, 40, 0)}, "labels: got 40, wanted 0 to 39"),
            ({"labels": ints(1, -100, -7, 0)}, "labels: got -7, wanted 0 to 39"),
            ({"vocab_size": 30}, "labels: got 39, wanted 0 to 29"),
            ({"vocab_size": 0}, "vocab_size: got 0, wanted 1 to 40, the rows of weight"),
            ({"vocab_size": 41}, "vocab_size: got 41, wanted 1 to 40"),
        )
    ),
    *(
        (attention, given, wrong, message)
        for attention, given in ((packed_attention, ROWS), (causal_attention, SQUARE))
        for wrong, message in (
            ({"query": given["query"][..., :8]}, r"query: got float32 .* 8\], wanted .* 16\]"),
            ({"query": given["query"][..., :3, :]}, "query: got .*, wanted a multiple of 2 heads"),
            ({"key": given["key"][:5]}, r"query: got float32 \[8, .*, wanted \[5, "),
            ({"key": given["key"].to(BF16)}, "key: got bfloat16 .*, wanted float32"),
            ({"value": given["value"][..., :1, :]}, r"value: got float32 .* 1, 32\], wanted float32 .* 2, 32\]"),
            ({"value": given["value"].double()}, "value: got float64 .*, wanted float32"),
            ({"sinks": draw(1)}, r"sinks: got float32 \[1\], wanted \[4\]"),
            ({"scale": 0.0}, r"scale: got 0\.0, wanted more than 0"),
            ({"window": 0}, "window: got 0, wanted at least 1"),
            ({"chunk": -1}, "chunk: got -1, wanted at least 1"),
        )
    ),
    *(
        (attention, given, {name: wrong}, f"{name}: got {message}")
        for attention, given, name in ((packed_attention, ROWS, "cu_seqlens"), (causal_attention, SQUARE, "bounds"))
        for wrong, message in (
            (ints(2, 6), r"\[2, 6\], wanted to rise from 0 to the tokens, 8"),
            (ints(0, 6), r"\[0, 6\], wanted to rise from 0 to the tokens, 8"),
            (ints(0, 6, 3, 8), r"\[0, 6, 3, 8\], wanted to rise"),
            (ints(0, 9), r"\[0, 9\], wanted to rise"),
            (ints(10, 20), r"\[10, 20\], wanted to rise"),
            (ints(), r"\[\], wanted to rise"),
            (ints(0, 8)[None], r"int64 \[1, 2\], wanted \[rows \+ 1\]"),
            (ints(1, *range(1, 9)), r"\[1, 1, 2, 3, '...', 5, 6, 7, 8\], wanted"),
        )
    ),
    (packed_attention, ROWS, {"dropout_p": 1.0}, r"dropout_p: got 1\.0"),
    (rms_norm, NORM, {"weight": draw(8)}, r"weight: got float32 \[8\], wanted \[16\]"),
    (rms_norm, NORM, {"weight": draw(1, 16)}, r"weight: got float32 \[1, 16\], wanted \[16\]"),
    (add_rms_norm, {**NORM, "residual": X}, {"residual": X[:1]}, r"residual: got float32 \[1, 16\], wanted \[4, 16\]"),
    (add_rms_norm, {**NORM, "residual": X}, {"weight": draw(1)}, r"weight: got float32 \[1\], wanted \[16\]"),
    (gated_activation, {"x": X, "gate": SILU}, {"x": X[:, :3]}, r"x: got \[4, 3\], wanted an even number of columns"),
    (gated_activation, {"x": X, "gate": SILU}, {"gate": Gate(limit=-1.0)}, r"gate\.limit: got -1\.0, wanted more than 0"),
    (rotate, ROTATED, {"x": X}, r"x: got float32 \[4, 16\], wanted \[s, b, heads, dim\]"),
    (rotate, ROTATED, {"table": draw(2, 3, 8)}, r"table: got float32 \[2, 3, 8\], wanted float32 \[2, 4, 8\]"),
    (rotate, ROTATED, {"table": draw(2, 4, 9)}, r"table: got \[2, 4, 9\], wanted \[2, 4, at most 8\]"),
    (rotate_, FUSED, {"x": draw(4, 1, 64)}, r"x: got \[4, 1, 64\], wanted \[s, b, ...\] with a multiple of 3 heads of 16 columns"),
    (rotate_, FUSED, {"table": draw(2, 4, 8, dtype=torch.float64)}, r"table: got float64 \[2, 4, 8\], wanted float32"),
    (permute, PLACES, {"x": X[0]}, r"x: got float32 \[16\], wanted \[rows, columns\]"),
    (permute, PLACES, {"places": PLACES["places"][:2]}, r"places: got int64 \[2, 2\], wanted \[4, 2\]"),
    (permute, PLACES, {"places": PLACES["places"].int()}, r"places: got int32 \[4, 2\], wanted int64"),
    (permute, PLACES, {"rows": 7}, "places: got 7, wanted .* to 6"),
    (unpermute, BACK, {"x": X}, "places: got 7, wanted .* to 3"),
    (unpermute, BACK, {"weights": draw(4, 1)}, r"weights: got float32 \[4, 1\], wanted float32 \[4, 2\]"),
    (unpermute, BACK, {"weights": draw(4, 2, dtype=BF16)}, r"weights: got bfloat16 \[4, 2\], wanted float32"),
]
CASES = [case for case in CASES if case[0] is not causal_attention or extension.available()]


def named(case: tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]) -> str:
    return f"{case[0].__name__}-{'-'.join(case[2])}"


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_an_error_names_the_argument_of_the_face(case: Any, kernels: str, auto_kernels: None) -> None:
    face, right, wrong, message = case
    choice.select(kernels)
    if face is not causal_attention or extension.isa_at_least("avx512"):  # it has no reference of its own
        face(**right)
    with pytest.raises(ValueError, match=f"^{message}"):
        face(**{**right, **wrong})


def test_autocast_casts_before_dtypes_are_compared(auto_kernels: None) -> None:
    with torch.autocast("cpu", dtype=BF16):
        assert lora_linear(**{**LORA, "x": X.to(BF16)}).dtype == BF16
        assert grouped_linear(**{**EXPERTS, "x": X.to(BF16)}).dtype == BF16
    assert lora_linear(**LORA).dtype == torch.float32


def test_what_cannot_be_looked_at_is_not() -> None:
    """Values in a graph, or on a device, are left to what runs there."""
    compiled = torch.compile(lambda numbers: checks.readable(numbers), backend="eager", fullgraph=True)
    assert checks.readable(ints(3))
    assert not compiled(ints(3))
    assert not checks.readable(torch.empty(3, device="meta"))
    checks.within("x", torch.empty(3, device="meta"), 0, 1)
    with pytest.raises(ValueError, match="x: got 2, wanted 0 to 1"):
        checks.within("x", ints(0, 2), 0, 1)


@pytest.mark.skipif(not extension.isa_at_least("avx2"), reason="no compiled kernels")
def test_the_operators_of_gradients_check_all_that_they_read() -> None:
    """A shape that is not what it seems would be read beyond its end."""
    ops = torch.ops.mswift
    x, weight, rstd = draw(4, 6, 16), draw(16), draw(4, 6)
    low, factor, none = draw(4, 2), draw(12), [0] * 5
    grads = draw(4, 12)
    wrong: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (ops.rms_norm_backward, (x, None, x, weight[:5], rstd, False, True), "weight must be"),
        (ops.rms_norm_backward, (x, None, x, weight, rstd[:2], False, True), "rstd must be float32"),
        (ops.rms_norm_backward, (x, None, x, weight, rstd.double(), False, True), "rstd must be float32"),
        (ops.rms_norm_backward, (x[:2], None, x, weight, rstd, False, True), "grad must be as x"),
        (ops.gated_activation_backward, (draw(8, 6, 4), x, 1.0, 0.0, 1.0, 0.0), r"grad must be \[4, 6, 8\]"),
        (ops.gated_activation_backward, (draw(4, 6, 8).double(), x, 1.0, 0.0, 1.0, 0.0), "in the dtype of x"),
        (ops.lora_linear_grad_factors, (grads, X, low, low.to(BF16), None, grads, none), "grad_low: got BFloat16"),
        (ops.lora_linear_grad_factors, (grads, X, low[0], low, None, grads, none), "low: got 1 dimensions"),
        (ops.lora_linear_grad_factors, (grads, X, low, low, factor, grads.to(BF16), none), "inner: wanted .* got BFloat16"),
        (ops.lora_linear_grad_factors, (grads, X, low, low, factor[:3], grads, none), "factor: wanted float32"),
    ]
    if extension.isa_at_least("avx512"):
        q, k, v, bounds = draw(8, 1, 4, 16), draw(8, 1, 2, 16), draw(8, 1, 2, 32), ints(0, 8)
        out, lse = ops.causal_attention(q, k, v, bounds, None, 1.0, 0, 0)
        for given, message in (
            ((out[:5], q, k, v, out, lse, bounds), "grad must be as out"),
            ((out.to(BF16), q, k, v, out, lse, bounds), "grad must be as out"),
            ((out, q, k, v, out[..., :16], lse, bounds), "out must be"),
            ((out, q, k, v, out, lse[:, :3], bounds), "lse must be float32"),
            ((out, q, k, v, out, lse.double(), bounds), "lse must be float32"),
            ((out, q, k, v, out, lse, ints(0, 5)), r"bounds must rise from 0 to the number of tokens, 8, got 0 to 5"),
        ):
            wrong.append((ops.causal_attention_backward, (*given, 1.0, 0, 0), message))
        wrong.append((ops.causal_attention, (q, k, v, ints(2, 6), None, 1.0, 0, 0), "got 2 to 6"))
        wrong.append((ops.causal_attention, (q, k, v, bounds, None, 1.0, -1, 0), "window and chunk must be above 0"))
    for operator, arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
