"""`kill -9` in the middle of an epoch, then ``--resume_from_checkpoint auto``: the losses are those of a run that nobody killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint, write_rows

ROOT = Path(__file__).parents[2]


def command(model: Path, rows: Path, output: Path, *extra: str) -> list[str]:
    flags = "--micro_batch_size 2 --global_batch_size 4 --num_train_epochs 2 --logging_steps 1 --save_steps 3 --learning_rate 1e-2"
    options = [*flags.split(), "--plot", "false", "--report_to", "none", "--output_dir", str(output), *extra]
    return [sys.executable, "-m", "mswift.cli", "sft", "--model", str(model), "--dataset", str(rows), *options]


def environment(processes: int) -> dict[str, str]:
    many = {"NPROC_PER_NODE": str(processes)} if processes > 1 else {}
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **many}


def losses(output: Path) -> dict[int, tuple[float, float]]:
    rows = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "a step was logged twice"
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


STREAMED = ("--streaming", "true", "--shuffle_buffer_size", "12")
PACKED = ["--packing", "true", "--packing_length", "128", "--num_train_epochs", "4"]


@pytest.mark.parametrize(
    "extra",
    [("--torch_dtype", "bfloat16"), ("--tensor_model_parallel_size", "2"), tuple(PACKED), STREAMED],
    ids=["bf16", "tp2", "packed", "streamed"],
)
def test_resume_after_kill(extra: tuple[str, ...], tmp_path: Path) -> None:
    processes = 2 if "--tensor_model_parallel_size" in extra else 1
    model, rows = make_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(model, rows, whole, *extra), env=environment(processes), check=True, capture_output=True, timeout=170)
    expected = losses(whole)
    last = max(expected)
    assert len(expected) == last >= 12

    kill_after_three_steps(command(model, rows, broken, *extra), broken, processes)
    done = sorted(path.name for path in broken.glob("checkpoint-*"))
    assert f"checkpoint-{last}" not in done, "the run was over before it was killed"
    (broken / ".checkpoint-6.incomplete").mkdir(exist_ok=True)  # as if it had been killed while it saved

    assert "steps are done" in go_on(command(model, rows, broken, *extra), processes)
    assert losses(broken) == expected
    assert not list(broken.glob(".*"))


@pytest.mark.parametrize(
    ("extra", "before", "after"),
    [(tuple(PACKED), 1, 2), ((*STREAMED, "--lora_dropout", "0"), 2, 1)],  # a dropout mask is of a place in the micro batch
    ids=["packed-1-2", "streamed-2-1"],
)
def test_resume_after_kill_on_another_number_of_ranks(extra: tuple[str, ...], before: int, after: int, tmp_path: Path) -> None:
    """Every step has the rows that it would have had: its loss is that of the whole run but for the order of sums, and no other step's."""
    model, rows = make_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(model, rows, whole, *extra), env=environment(1), check=True, capture_output=True, timeout=170)
    expected = losses(whole)
    kill_after_three_steps(command(model, rows, broken, *extra), broken, before)
    assert f"checkpoint-{max(expected)}" not in {path.name for path in broken.glob("checkpoint-*")}, "the run was over before it was killed"
    assert f"dp{after} ({after} process" in go_on(command(model, rows, broken, *extra), after)
    found = losses(broken)
    assert found.keys() == expected.keys()
    for step, (loss, norm) in expected.items():
        assert found[step] == pytest.approx((loss, norm), rel=2e-4), step
        others = [other for k, (other, _) in expected.items() if k != step]
        assert all(abs(other - loss) > 4e-4 * loss for other in others), "the losses tell steps apart"


def kill_after_three_steps(arguments: list[str], output: Path, processes: int) -> None:
    process = subprocess.Popen(
        arguments, env=environment(processes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(output / "checkpoint-3" / "resume" / "resume.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def go_on(arguments: list[str], processes: int) -> str:
    """What the run says that goes on from the newest checkpoint."""
    arguments = [*arguments, "--resume_from_checkpoint", "auto"]
    again = subprocess.run(arguments, env=environment(processes), capture_output=True, text=True, timeout=170, check=False)
    assert again.returncode == 0, again.stderr
    return again.stderr
