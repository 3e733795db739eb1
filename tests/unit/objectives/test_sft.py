"""The supervised objective: a sum over weighted tokens and its divisor, and nothing divided before all is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mswift.objectives.base import LossOut, Outputs
from mswift.objectives.sft import SupervisedObjective


def loss_of(log_probs: torch.Tensor, weights: torch.Tensor) -> LossOut:
    return SupervisedObjective().loss(Outputs(log_probs), SimpleNamespace(weights=weights))


def test_total_and_weight() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, 0.0], [-4.0, 0.0, 0.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0]])
    out = loss_of(log_probs, weights)
    assert out.total.item() == 1.0 + 1.0 + 8.0
    assert out.weight.item() == 3.5
    out.total.backward()
    assert torch.equal(log_probs.grad, -weights)


def test_splitting_a_batch_changes_no_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, weights = -torch.rand(6, 9, generator=generator), torch.rand(6, 9, generator=generator)
    whole = loss_of(log_probs, weights)
    parts = [loss_of(log_probs[rows], weights[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-6)
    assert sum(part.weight.item() for part in parts) == pytest.approx(whole.weight.item(), rel=1e-6)


def test_a_batch_without_weight_counts_for_nothing() -> None:
    out = loss_of(torch.zeros(1, 4), torch.zeros(1, 4))
    assert out.total.item() == 0.0
    assert out.weight.item() == 0.0
    assert out.metrics == {}
    assert SupervisedObjective.name == "sft"
