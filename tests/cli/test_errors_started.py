"""Errors as a user gets them, from a process that they start: the answer costs less than a second of computing, with two processes as well."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Lab
from tests.cli.program import Outcome, Worker, assert_one_line, contents, environment
from tests.cli.test_errors_early import CASES


def start(words: list[str], folder: Path, **changes: str) -> tuple[Outcome, float]:
    """What ``mswift WORDS`` gives, and the seconds that it and its children computed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mswift.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment(**changes), capture_output=True, text=True, timeout=100, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(done.returncode, done.stdout, done.stderr, torch=False), seconds


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("name", ["missing_model", "truncated_weights", "unknown_flag", "missing_data", "folder_of_another_run"])
def test_it_comes_at_once(name: str, processes: str, lab: Lab) -> None:
    prepare, wanted, _ = CASES[name]
    words = prepare(lab)
    (lab.folder / "temporary").mkdir()
    before = contents(lab.folder)
    outcome, seconds = start(words, lab.folder, NPROC_PER_NODE=processes, TMPDIR=str(lab.folder / "temporary"))
    assert_one_line(outcome, *wanted)
    assert outcome.out == ""
    assert contents(lab.folder) == before
    assert seconds < 1


def test_a_port_in_use(lab: Lab, light: Worker) -> None:
    words = lab.sft()
    before = contents(lab.folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        outcome = light.run(words, lab.folder, NPROC_PER_NODE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert_one_line(outcome, f"port {port} (MASTER_PORT) is in use by another program", "set MASTER_PORT to a free one")
    assert contents(lab.folder) == before


def test_a_hub_that_cannot_be_reached(lab: Lab) -> None:
    words = lab.sft(model="nobody/nothing")
    before = contents(lab.folder)
    outcome, _ = start(words, lab.folder)
    line = assert_one_line(outcome, "nobody/nothing is not a local directory and could not be had from Hugging Face")
    assert re.search(r"\(.+\); check the name and the connection$", line)
    assert contents(lab.folder) == before
