"""What the loop knows while it runs, and the hooks through which everybody else takes part."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class StepRecord:
    """Figures of one step, averaged since the last logged one where that makes sense.

    Args:
        step: optimizer steps done. epoch: epochs done, with fraction. loss: mean over the tokens of the steps since the last record.
        grad_norm: before clipping. learning_rate. tokens_per_s: real tokens, all ranks. step_time_s, data_wait_s: per step.
        padding: share of the positions that were padding, 0 to 1. memory_gib: largest of all ranks. remaining_s: estimate.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_s: float
    step_time_s: float
    data_wait_s: float
    padding: float
    memory_gib: float
    remaining_s: float


@dataclass(slots=True)
class TrainState:
    """Where the run stands."""

    output_dir: Path
    total_steps: int
    steps_per_epoch: int
    step: int = 0
    eval_losses: list[tuple[int, float]] = field(default_factory=list)


class Callback:
    """Hooks of the loop, called on every rank; a callback overrides what it needs."""

    def on_train_start(self, state: TrainState) -> None: ...
    def on_step(self, state: TrainState) -> None: ...
    def on_log(self, state: TrainState, record: StepRecord) -> None: ...
    def on_evaluate(self, state: TrainState, loss: float) -> None: ...
    def on_save(self, state: TrainState, directory: Path) -> None: ...
    def on_train_end(self, state: TrainState) -> None: ...
