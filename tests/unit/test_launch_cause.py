"""Which of several workers that ended the user hears of."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mswift.launch import _report_worker, cause_of

TERMINATED, KILLED, LATER = -signal.SIGTERM, -signal.SIGKILL, 2**32


def failure(folder: Path, rank: int, exit_code: int, *, said: str = "", at: int = 1) -> ProcessFailure:
    path = folder / f"error-{rank}.json"
    if said:
        path.write_text(json.dumps({"message": said, "timestamp": at, "exit_code": 2}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=exit_code, error_file=str(path))


def test_a_worker_that_spoke_and_was_ended_while_it_left_is_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its exit can take longer than the second that the others wait; the agent then ends it."""
    failures = {0: failure(tmp_path, 0, TERMINATED, said="the disk is full", at=5), 1: failure(tmp_path, 1, 2, said="rank 0 failed", at=6)}
    assert cause_of(failures)[0] == 0
    assert _report_worker(ChildFailedError("mswift", failures)) == 2
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_a_worker_that_was_ended_because_of_another_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures = {0: failure(tmp_path, 0, TERMINATED), 2: failure(tmp_path, 2, 2, said="row 7 is bad", at=LATER)}
    assert cause_of(failures)[0] == 2
    assert _report_worker(ChildFailedError("mswift", failures)) == 2
    assert capsys.readouterr().err == "error: row 7 is bad (rank 2)\n"


def test_a_worker_that_was_killed_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoke = failure(tmp_path, 0, 2, said="cannot reach rank 1", at=LATER)
    failures = {0: spoke, 1: failure(tmp_path, 1, KILLED), 2: failure(tmp_path, 2, TERMINATED)}
    assert cause_of(failures)[0] == 1
    assert _report_worker(ChildFailedError("mswift", failures)) == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL; the machine may be out of memory" in capsys.readouterr().err
