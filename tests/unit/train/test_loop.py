"""The loop with a real data set and a small engine of its own: what is called when, what is logged, where it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mswift.data.batches import Batches, MicroBatch
from mswift.engines.base import StepResult
from mswift.parallel.layout import ParallelLayout
from mswift.train.callbacks import JsonLinesCallback, PlotCallback, TensorBoardCallback, duration, format_record, read_records
from mswift.train.loop import DivergedError, LoopSettings, TrainLoop
from mswift.train.schedule import LearningRate
from mswift.train.state import Callback, StepRecord, TrainState


class Rows:
    """A data set of rows 2, 3, 4, ... tokens long."""

    def __init__(self, count: int) -> None:
        self.lengths = np.arange(2, 2 + count)

    def __len__(self) -> int:
        return len(self.lengths)

    def arrays(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        length = int(self.lengths[row])
        return np.arange(length, dtype=np.int32), np.ones(length, np.float32)


class CountingEngine:
    """Not a model: its loss is 10 / (step + 1); it records what it was asked."""

    device = torch.device("cpu")
    groups = SimpleNamespace(layout=ParallelLayout())

    def __init__(self, diverge_at: int = -1) -> None:
        self.steps: list[tuple[int, float, int]] = []
        self.evaluated = 0
        self.diverge_at = diverge_at

    def train_step(self, batches: Sequence[MicroBatch], objective: Any, *, step: int, learning_rate: float) -> StepResult:
        self.steps.append((step, learning_rate, sum(batch.num_tokens for batch in batches)))
        loss = math.nan if step == self.diverge_at else 10 / (step + 1)
        return StepResult(loss=loss, weight=4.0, grad_norm=0.5)

    def evaluate(self, batches: Sequence[MicroBatch], objective: Any) -> tuple[float, float]:
        self.evaluated += 1
        return 3.0 * len(batches), float(len(batches))

    def memory_bytes(self) -> int:
        return 2**30


class Witness(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.records: list[StepRecord] = []

    def on_train_start(self, state: TrainState) -> None:
        self.events.append("start")

    def on_log(self, state: TrainState, record: StepRecord) -> None:
        self.events.append(f"log {record.step}")
        self.records.append(record)

    def on_evaluate(self, state: TrainState, loss: float) -> None:
        self.events.append(f"eval {state.step} {loss}")

    def on_save(self, state: TrainState, directory: Path) -> None:
        self.events.append(f"save {directory.name}")

    def on_train_end(self, state: TrainState) -> None:
        self.events.append("end")


pytestmark = pytest.mark.usefixtures("world_of_one")


def make_loop(tmp_path: Path, engine: CountingEngine, callbacks: list[Callback], **changes: Any) -> tuple[TrainLoop, TrainState]:
    batches = Batches(Rows(10), micro_batch_size=2, global_batch_size=4)  # type: ignore[arg-type]
    settings = LoopSettings(**{"total_steps": 7, "logging_steps": 3, "eval_steps": 4, "save_steps": 5, **changes})
    evaluation = Batches(Rows(4), micro_batch_size=2, global_batch_size=4, shuffle=False)  # type: ignore[arg-type]
    loop = TrainLoop(
        engine,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        batches,
        LearningRate(1.0, settings.total_steps),
        settings,
        eval_batches=evaluation,
        save=lambda state: tmp_path / f"checkpoint-{state.step}",
        callbacks=callbacks,
    )
    return loop, TrainState(tmp_path, settings.total_steps, batches.steps_per_epoch)


def test_what_happens_when(tmp_path: Path) -> None:
    engine, witness = CountingEngine(), Witness()
    loop, state = make_loop(tmp_path, engine, [witness])
    loop.run(state)
    assert witness.events == [
        *("start", "log 1", "log 3", "eval 4 3.0", "save checkpoint-5", "log 6", "log 7", "eval 7 3.0", "save checkpoint-7", "end")
    ]
    assert [step for step, _, _ in engine.steps] == list(range(7))
    assert engine.steps[0][1] == 1.0
    assert engine.evaluated == 2
    assert state.eval_losses == [(4, 3.0), (7, 3.0)]


def test_records_average_over_the_steps_since_the_last_one(tmp_path: Path) -> None:
    engine, witness = CountingEngine(), Witness()
    loop, state = make_loop(tmp_path, engine, [witness])
    loop.run(state)
    first, second, third, last = witness.records
    assert first.loss == 10.0
    assert second.loss == pytest.approx((10 / 2 + 10 / 3) / 2)
    assert third.loss == pytest.approx((10 / 4 + 10 / 5 + 10 / 6) / 3)
    assert last.epoch == pytest.approx(7 / 3)
    assert last.remaining_s == 0.0
    assert second.remaining_s == pytest.approx(second.step_time_s * 4)
    assert 0 <= second.padding < 1
    assert second.memory_gib == 1.0
    tokens = sum(count for step, _, count in engine.steps if step in (1, 2))
    assert second.tokens_per_s == pytest.approx(tokens / (2 * second.step_time_s), rel=1e-6)


def test_a_resumed_loop_starts_at_its_step(tmp_path: Path) -> None:
    engine, witness = CountingEngine(), Witness()
    loop, state = make_loop(tmp_path, engine, [witness])
    state.step = 5
    loop.run(state)
    assert [step for step, _, _ in engine.steps] == [5, 6]
    assert witness.events == ["start", "log 6", "log 7", "eval 7 3.0", "save checkpoint-7", "end"]


def test_a_loss_that_is_no_number_stops_before_anything_is_saved(tmp_path: Path) -> None:
    witness = Witness()
    loop, state = make_loop(tmp_path, CountingEngine(diverge_at=4), [witness])
    with pytest.raises(DivergedError, match="step 5: loss nan") as caught:
        loop.run(state)
    assert "lower --learning_rate" in str(caught.value)
    assert not any(event.startswith("save") for event in witness.events)


def test_files_of_a_run(tmp_path: Path) -> None:
    loop, state = make_loop(tmp_path, CountingEngine(), [JsonLinesCallback(tmp_path), TensorBoardCallback(tmp_path), PlotCallback(tmp_path)])
    loop.run(state)
    rows = read_records(tmp_path / "logging.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 4, 6, 7, 7]
    assert rows[2] == {"step": 4, "eval_loss": 3.0}
    assert set(rows[0]) == set(StepRecord.__slots__)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3, 6, 7]
    assert events.Scalars("eval/loss")[0].value == 3.0


def test_a_resumed_run_forgets_the_records_that_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 3, 6)) + '{"step": 7, "lo')
    loop, state = make_loop(tmp_path, CountingEngine(), [JsonLinesCallback(tmp_path)])
    state.step = 5
    loop.run(state)
    assert [row["step"] for row in read_records(path)] == [1, 3, 6, 7, 7]


def test_one_line_says_it_all() -> None:
    record = StepRecord(
        step=5,
        epoch=0.5,
        loss=1.23456,
        grad_norm=0.5,
        learning_rate=1e-4,
        tokens_per_s=1234.5,
        step_time_s=0.83,
        data_wait_s=0.002,
        padding=0.125,
        memory_gib=1.5,
        remaining_s=75,
    )
    line = format_record(record, 100)
    for part in (
        "step   5/100",
        "loss 1.2346",
        "grad 0.500",
        "lr 1.00e-04",
        "1,234 tok/s",
        "0.83 s/step",
        "wait 2 ms",
        "pad 12%",
        "1.5 GiB",
        "left 1:15",
    ):
        assert part in line
    assert len(line) < 150
    assert duration(3700) == "1:01:40"
