"""A disk that takes no more: one line, no half-written folder, and the run goes on from the checkpoint before once there is room."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Lab
from tests.cli.program import Outcome, Worker, assert_one_line, contents, environment

ADVICE = "earlier checkpoints are whole: mend that, then add --resume_from_checkpoint auto"


def assert_failed(err: str, *wanted: str) -> None:
    """The lines of a run's progress, and then one of an error that holds every text of `wanted`."""
    lines = err.splitlines()
    assert "Traceback" not in err
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], err
    assert all(text in lines[-1] for text in wanted), lines[-1]


@pytest.fixture
def half(lab: Lab) -> Lab:
    """A lab with ``run`` as it was after its first checkpoint."""
    shutil.rmtree(lab.copy("run") / "checkpoint-4")
    return lab


def resume(lab: Lab, output: Path | str = "run") -> list[str]:
    return lab.sft("--resume_from_checkpoint", "auto", output=str(output))


def assert_goes_on(lab: Lab, outcome: Outcome, output: Path) -> None:
    """The run came to its end, and what it wrote equals what the run wrote that nothing happened to."""
    assert outcome.code == 0, outcome.err
    assert "2 steps are done" in outcome.err
    names = {path.name for path in output.iterdir()}
    assert names == {"args.json", "checkpoint-2", "checkpoint-4", "logging.jsonl"}
    written, expected = (path / "checkpoint-4" / "adapter_model.safetensors" for path in (output, lab.base / "run"))
    assert written.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("limit", [100_000, 300_000], ids=["adapter", "state"])
def test_a_checkpoint_that_is_cut_short(limit: int, half: Lab, heavy: Worker) -> None:
    words, run = resume(half), half.folder / "run"
    before = contents(run / "checkpoint-2")
    outcome = heavy.run(words, half.folder, file_limit=limit)
    assert outcome.code == 2
    assert_failed(outcome.err, "saving run/checkpoint-4 failed", "File too large", ADVICE)
    assert {path.name for path in run.iterdir()} == {"args.json", "checkpoint-2", "logging.jsonl"}
    assert contents(run / "checkpoint-2") == before
    assert_goes_on(half, heavy.run(words, half.folder), run)


def test_a_whole_model_that_is_cut_short(lab: Lab, heavy: Worker) -> None:
    outcome = heavy.run(lab.sft("--tuner_type", "full"), lab.folder, file_limit=300_000)
    assert outcome.code == 2
    assert_failed(outcome.err, "saving out/checkpoint-2 failed", "model.safetensors.part: File too large", ADVICE)
    assert {path.name for path in (lab.folder / "out").iterdir()} == {"args.json", "logging.jsonl"}


def test_a_merged_model_that_is_cut_short(lab: Lab, heavy: Worker) -> None:
    outcome = heavy.run(lab.sft("--merge_lora", "true", "--max_steps", "2"), lab.folder, file_limit=600_000)
    assert outcome.code == 2
    assert_failed(outcome.err, "cannot write out/.merged", "File too large", "free some space or choose another directory")
    assert {path.name for path in (lab.folder / "out").iterdir()} == {"args.json", "checkpoint-2", "logging.jsonl"}


def test_an_export_that_is_cut_short(lab: Lab, heavy: Worker) -> None:
    words = lab.export()
    before = contents(lab.folder)
    outcome = heavy.run(words, lab.folder, file_limit=300_000)
    assert_one_line(outcome, "model.safetensors.part: File too large", "free some space or choose another directory")
    assert contents(lab.folder) == before


def test_two_processes_clean_up_together(half: Lab) -> None:
    words, run = resume(half), half.folder / "run"
    done = subprocess.run(
        [sys.executable, "-m", "mswift.cli", *words],
        cwd=half.folder,
        env=environment(NPROC_PER_NODE="2"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert_failed(done.stderr, "saving run/checkpoint-4 failed on rank 0: File too large", ADVICE)
    assert {path.name for path in run.iterdir()} == {"args.json", "checkpoint-2", "logging.jsonl"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: it takes root and CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave `left` bytes free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - left))


def test_a_full_disk(half: Lab, heavy: Worker, disk: Path) -> None:
    run = disk / "run"
    shutil.copytree(half.folder / "run", run)
    words = resume(half, run)
    before = contents(run)
    # too little for the state, known before a byte of it is written; then enough by that count, but not for files and folders around it
    for left, reason in ((300_000, "0.3 MiB are free there, 0.4 MiB needed"), (450_000, "")):
        fill(disk, left)
        outcome = heavy.run(words, half.folder)
        assert outcome.code == 2
        assert_failed(outcome.err, f"saving {run}/checkpoint-4 failed: ", reason, ADVICE)
        assert {path.name for path in run.iterdir()} == {"args.json", "checkpoint-2", "logging.jsonl"}
        now = contents(run)
        assert all(now[name] == content for name, content in before.items() if name.startswith("checkpoint-2"))
    fill(disk, 0)
    (run / "args.json").write_text("{}")
    outcome = heavy.run(words, half.folder)
    assert_failed(outcome.err, "No space left on device", "give another folder, or mend that")
    assert (run / "args.json").read_text() == "{}", "the old one stays"
    (disk / "filler").unlink()
    assert_goes_on(half, heavy.run(words, half.folder), run)
