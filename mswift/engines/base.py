"""What the training loop asks of an engine. The loop knows nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mswift.data.batches import MicroBatch
from mswift.objectives.base import Objective
from mswift.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one optimizer step over the global batch, the same on every rank.

    Args:
        loss: total / weight. weight: the divisor. grad_norm: before clipping.
    """

    loss: float
    weight: float
    grad_norm: float


class Engine(Protocol):
    """Build, step, score, save, export."""

    groups: Groups
    device: torch.device

    def train_step(self, batches: Sequence[MicroBatch], objective: Objective, *, step: int, learning_rate: float) -> StepResult:
        """One optimizer step; `batches` are this data-parallel rank's part of the global batch."""

    def evaluate(self, batches: Sequence[MicroBatch], objective: Objective) -> tuple[float, float]:
        """(sum, weight) of the objective over all ranks' batches, without gradients."""

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """What a checkpoint holds of the model and the optimizer, as megatron-core's sharded tensors."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `sharded_state` described."""

    def export_adapter(self, directory: Path) -> None:
        """Write the adapter as a PEFT directory; all ranks call it."""

    def export_merged(self, directory: Path, *, max_shard_size: str) -> None:
        """Write the whole model, adapters merged, as a Hugging Face directory; all ranks call it."""

    def memory_bytes(self) -> int: ...

    def trained_elements(self) -> list[int]:
        """Number of elements of each trained tensor on this rank."""
