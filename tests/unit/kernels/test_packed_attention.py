"""Attention over rows end to end: equal to an attention written out token by token, blind to other rows, with the right gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.kernels.packed_attention import packed_attention

HEADS, GROUPS, WIDTH, VALUES = 6, 3, 10, 14
LENGTHS = [5, 1, 0, 17, 3]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.2},
    "window": {"window": 4},
    "chunk": {"chunk": 6},
    "softcap": {"softcap": 1.5, "scale": 0.4},
    "sinks": {"sinks": True},
    "sinks-window": {"sinks": True, "window": 4},
    "softcap-chunk-window": {"softcap": 2.0, "chunk": 7, "window": 3},
}


def make(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """(query, key, value), bounds, sinks; all fp64 and trained."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    shapes = [(total, HEADS, WIDTH), (total, GROUPS, WIDTH), (total, GROUPS, VALUES), (HEADS,)]
    *qkv, sinks = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return qkv, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32), sinks


def token_by_token(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], options: dict[str, Any]) -> Tensor:
    """The definition: each query, each head, a softmax over what it sees."""
    window, chunk, cap, sinks = (options.get(name) for name in ("window", "chunk", "softcap", "sinks"))
    rows = []
    for start, end in itertools.pairwise(bounds):
        for t in range(start, end):
            first = max(start, t - (window or t + 1) + 1, start + (t - start) // chunk * chunk if chunk else start)
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = k[first : t + 1, group] @ q[t, head] * options.get("scale", WIDTH**-0.5)
                scores = scores if cap is None else cap * (scores / cap).tanh()
                scores = scores if sinks is None else torch.cat((scores, sinks[head, None]))
                heads.append(scores.softmax(0)[: t + 1 - first] @ v[first : t + 1, group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_those_of_the_definition(variant: str) -> None:
    qkv, bounds, sinks = make()
    options = {**VARIANTS[variant], **({"sinks": sinks} if "sinks" in VARIANTS[variant] else {})}
    trained = [*qkv, sinks] if "sinks" in options else qkv
    ours, wanted = packed_attention(*qkv, bounds, **options), token_by_token(*qkv, bounds.tolist(), options)
    assert ours.shape == (sum(LENGTHS), HEADS, VALUES)
    assert torch.allclose(ours, wanted, atol=1e-6)  # the softmax of a capped score is in fp32
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, expected in zip(torch.autograd.grad(ours, trained, pull), torch.autograd.grad(wanted, trained, pull), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
        assert expected.abs().max() > 0.1


def test_a_row_does_not_feel_its_neighbours() -> None:
    qkv, bounds, _ = make()
    before = packed_attention(*qkv, bounds)
    changed = [tensor.detach().clone() for tensor in qkv]
    start, end = int(bounds[3]), int(bounds[4])
    for tensor in changed:
        tensor[start:end] += 1.0
    after = packed_attention(*changed, bounds)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.isclose(before[start:end], after[start:end]).any()


def test_dropout_takes_weights_away_and_keeps_their_mean() -> None:
    q, k = (torch.zeros(400, heads, WIDTH) for heads in (HEADS, GROUPS))
    value, bounds = torch.ones(400, GROUPS, VALUES), torch.tensor([0, 100, 400], dtype=torch.int32)
    torch.manual_seed(3)
    dropped = packed_attention(q, k, value, bounds, dropout_p=0.5)
    assert dropped.mean() == pytest.approx(1.0, abs=0.05)
    assert dropped.std() > 0.05
    assert torch.allclose(packed_attention(q, k, value, bounds), torch.ones(()))
    assert packed_attention(q.bfloat16(), k.bfloat16(), value.bfloat16(), bounds).dtype == torch.bfloat16
