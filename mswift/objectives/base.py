"""The contract between objectives and engines: a sum, its divisor, and figures. Pure functions of tensors; no engine, no trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What an engine computed for a micro batch.

    Args:
        log_probs: fp32 ``[b, s]``, the log-probability of each label; zero where there is none.
    """

    log_probs: Tensor


class ScoredBatch(Protocol):
    """What an objective may read of a micro batch."""

    @property
    def weights(self) -> Tensor:
        """fp32 ``[b, s]``: how much each label counts."""


@dataclass(frozen=True)
class LossOut:
    """A loss before its division.

    Args:
        total: scalar fp32, the sum to differentiate. weight: scalar fp32, what the sum over the whole global batch is divided by.
        metrics: name -> scalar sum; each is divided by the global weight for display.
    """

    total: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Turns outputs into a loss. The engine divides once, by the weight of the global batch, so that no layout changes the number."""

    name: str

    def loss(self, outputs: Outputs, batch: ScoredBatch) -> LossOut: ...
