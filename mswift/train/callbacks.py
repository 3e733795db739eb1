"""What a run shows and leaves behind: a progress bar with one line per logging step, logging.jsonl, TensorBoard, a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from mswift.conversion.staging import replace_file
from mswift.log import is_main_process
from mswift.train.state import Callback, StepRecord, TrainState


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_record(record: StepRecord, total_steps: int) -> str:
    """One line that fits 150 columns."""
    return (
        f"step {record.step:>{len(str(total_steps))}}/{total_steps}  loss {record.loss:.4f}  grad {record.grad_norm:.3f}  "
        f"lr {record.learning_rate:.2e}  {record.tokens_per_s:,.0f} tok/s  {record.step_time_s:.2f} s/step  wait {record.data_wait_s * 1e3:.0f} ms  "
        f"pad {record.padding:.0%}  mem {record.memory_gib:.1f} GiB  left {duration(record.remaining_s)}"
    )


class ProgressCallback(Callback):
    """A bar on a terminal; plain lines where the output is a file."""

    def on_train_start(self, state: TrainState) -> None:
        self.bar: Any = None
        if not is_main_process():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True, soft_wrap=True, highlight=False)
        if console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("training", total=state.total_steps, completed=state.step)
            self.bar.start()
        self.console = console

    def on_step(self, state: TrainState) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.step)

    def on_log(self, state: TrainState, record: StepRecord) -> None:
        self._say(format_record(record, state.total_steps))

    def on_evaluate(self, state: TrainState, loss: float) -> None:
        self._say(f"step {state.step}/{state.total_steps}  validation loss {loss:.4f}")

    def on_save(self, state: TrainState, directory: Path) -> None:
        self._say(f"saved {directory}")

    def on_train_end(self, state: TrainState) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _say(self, text: str) -> None:
        if is_main_process():
            self.console.print(text, markup=False) if self.bar is not None else print(text, file=sys.stderr, flush=True)


class JsonLinesCallback(Callback):
    """``logging.jsonl``: one object a record, appended, so that a resumed run goes on in the same file."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "logging.jsonl"

    def on_train_start(self, state: TrainState) -> None:
        self.file: TextIO | None = None
        if is_main_process():
            _forget_after(self.path, state.step)
            self.file = self.path.open("a", encoding="utf8")

    def on_log(self, state: TrainState, record: StepRecord) -> None:
        self._write({key: round(value, 10) if isinstance(value, float) else value for key, value in asdict(record).items()})

    def on_evaluate(self, state: TrainState, loss: float) -> None:
        self._write({"step": state.step, "eval_loss": loss})

    def on_train_end(self, state: TrainState) -> None:
        if self.file is not None:
            self.file.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def _forget_after(path: Path, step: int) -> None:
    """Drop the records of steps that a resumed run will do again."""
    if not path.exists():
        return
    rows = read_records(path)
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``logging.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoardCallback(Callback):
    """The same figures as TensorBoard scalars under ``runs/``."""

    def __init__(self, output_dir: Path) -> None:
        self.directory = output_dir / "runs"

    def on_train_start(self, state: TrainState) -> None:
        self.writer: Any = None
        if is_main_process():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.directory), purge_step=state.step + 1 if state.step else None)

    def on_log(self, state: TrainState, record: StepRecord) -> None:
        if self.writer is not None:
            for key, value in asdict(record).items():
                if key != "step":
                    self.writer.add_scalar(f"train/{key}", value, record.step)

    def on_evaluate(self, state: TrainState, loss: float) -> None:
        if self.writer is not None:
            self.writer.add_scalar("eval/loss", loss, state.step)

    def on_train_end(self, state: TrainState) -> None:
        if self.writer is not None:
            self.writer.close()


class PlotCallback(Callback):
    """``loss.png``: loss (and validation loss) above, learning rate below, drawn once at the end."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def on_train_end(self, state: TrainState) -> None:
        if is_main_process():
            from mswift.train.plots import draw_training

            draw_training(read_records(self.output_dir / "logging.jsonl"), self.output_dir / "loss.png")
