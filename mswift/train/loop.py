"""The one training loop: it knows an engine, an objective, batches and callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mswift.data.batches import StepSource
from mswift.data.prefetch import Prefetcher
from mswift.engines.base import Engine, StepResult
from mswift.errors import MswiftError
from mswift.objectives.base import Objective
from mswift.train.schedule import LearningRate
from mswift.train.state import Callback, StepRecord, TrainState

SaveCheckpoint = Callable[[TrainState], Path]


class DivergedError(MswiftError, ArithmeticError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """When the loop logs, evaluates and saves, in optimizer steps; 0 = never (evaluation), only at the end (saving)."""

    total_steps: int
    logging_steps: int = 5
    eval_steps: int = 500
    save_steps: int = 500
    log_first_step: bool = True


class _Window:
    """Sums since the last logged step; exchanged between ranks only when a line is due."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.loss = self.weight = self.waited = 0.0
        self.tokens = self.positions = self.steps = 0

    def add(self, result: StepResult, batches: Sequence, waited: float) -> None:
        self.steps += 1
        self.loss += result.loss * result.weight
        self.weight += result.weight
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.positions += sum(batch.input_ids.numel() for batch in batches)
        self.waited += waited


class TrainLoop:
    """Runs `engine` over `batches` until `settings.total_steps`, from wherever `state.step` says."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        batches: StepSource,
        schedule: LearningRate,
        settings: LoopSettings,
        *,
        eval_batches: StepSource | None = None,
        save: SaveCheckpoint | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.engine, self.objective, self.batches, self.schedule, self.settings = engine, objective, batches, schedule, settings
        self.eval_batches, self.save, self.callbacks = eval_batches, save, callbacks

    def run(self, state: TrainState) -> None:
        """Train to the end. The state of a resumed run starts at its step; its random numbers follow from the step alone.

        Raises:
            DivergedError: the loss is not finite; nothing is saved after that.
        """
        for callback in self.callbacks:
            callback.on_train_start(state)
        window = _Window()
        prefetcher = Prefetcher(self.batches, state.step, stop=state.total_steps)
        try:
            for step, batches in prefetcher:
                result = self.engine.train_step(batches, self.objective, step=step, learning_rate=self.schedule.at(step))
                self._require_finite(result, step)
                state.step = step + 1
                window.add(result, batches, prefetcher.last_wait_s)
                for callback in self.callbacks:
                    callback.on_step(state)
                window = self._after_step(state, result, window)
        finally:
            prefetcher.close()
        for callback in self.callbacks:
            callback.on_train_end(state)

    def _after_step(self, state: TrainState, result: StepResult, window: _Window) -> _Window:
        settings, last = self.settings, state.step == state.total_steps
        first = settings.log_first_step and window.steps == state.step == 1
        if first or last or state.step % settings.logging_steps == 0:
            record = self._record(state, result, window)
            for callback in self.callbacks:
                callback.on_log(state, record)
            window = _Window()
        paused = time.perf_counter()
        if self.eval_batches is not None and (last or (settings.eval_steps and state.step % settings.eval_steps == 0)):
            self.evaluate(state)
        if self.save is not None and (last or (settings.save_steps and state.step % settings.save_steps == 0)):
            directory = self.save(state)
            for callback in self.callbacks:
                callback.on_save(state, directory)
        window.started += time.perf_counter() - paused
        return window

    def evaluate(self, state: TrainState) -> float:
        """Mean objective over the validation rows; the same number on every rank."""
        assert self.eval_batches is not None
        total = weight = 0.0
        for step in range(self.eval_batches.steps_per_epoch):
            part, part_weight = self.engine.evaluate(self.eval_batches.step(step), self.objective)
            total, weight = total + part, weight + part_weight
        loss = total / max(weight, 1e-12)
        state.eval_losses.append((state.step, loss))
        for callback in self.callbacks:
            callback.on_evaluate(state, loss)
        return loss

    def _record(self, state: TrainState, result: StepResult, window: _Window) -> StepRecord:
        elapsed = time.perf_counter() - window.started
        tp_pp = self.engine.groups.layout.tp * self.engine.groups.layout.pp
        sums = torch.tensor([window.tokens, window.positions], dtype=torch.float64, device=self.engine.device)
        peaks = torch.tensor([window.waited, float(self.engine.memory_bytes())], dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(sums)
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        tokens, positions = sums.tolist()
        step_time = elapsed / window.steps
        return StepRecord(
            step=state.step,
            epoch=state.step / state.steps_per_epoch,
            loss=window.loss / max(window.weight, 1e-12),
            grad_norm=result.grad_norm,
            learning_rate=self.schedule.at(state.step - 1),
            tokens_per_s=tokens / tp_pp / elapsed,
            step_time_s=step_time,
            data_wait_s=float(peaks[0]) / window.steps,
            padding=1.0 - tokens / max(1.0, positions),
            memory_gib=float(peaks[1]) / 2**30,
            remaining_s=step_time * (state.total_steps - state.step),
        )

    def _require_finite(self, result: StepResult, step: int) -> None:
        if not (abs(result.loss) < float("inf") and abs(result.grad_norm) < float("inf")):
            raise DivergedError(
                f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}: wanted finite numbers; "
                f"lower --learning_rate (now {self.schedule.at(step):.2e}) or resume from an earlier checkpoint"
            )
