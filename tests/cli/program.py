"""Many runs of the command line program in one process that has torch imported already.

A start of torch and megatron-core takes longer than most tests, so `Worker` runs `mswift.cli.main` again and again in one child process
and gives back for each run what a process would have given: exit code, stdout, stderr.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from mswift import cli

ROOT = Path(__file__).parents[2]
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """What one run gave. torch: whether its process had imported torch at the end."""

    code: int
    out: str
    err: str
    torch: bool


def environment(**changes: str) -> dict[str, str]:
    """This environment without what starts several processes, with `changes`; no hub is asked."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH and not name.startswith("SLURM_")}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


class Worker:
    """A child process that runs one command line after the other."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.cli.program"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, words: list[str], folder: Path, *, file_limit: int | None = None, **changes: str) -> Outcome:
        """``mswift WORDS`` in `folder`.

        Args:
            file_limit: bytes that a file may have; a write past them fails as on a full disk. changes: to the environment.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([words, str(folder), file_limit, changes]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the worker died of mswift {' '.join(words)}"
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for request in sys.stdin:
        words, folder, file_limit, changes = json.loads(request)
        before = dict(os.environ)
        os.environ.update(changes)
        os.chdir(folder)
        answer = _captured(words, file_limit)
        os.environ.clear()
        os.environ.update(before)
        print(json.dumps(answer), file=answers, flush=True)


def _captured(words: list[str], file_limit: int | None) -> dict[str, object]:
    """One run with what it, or a child of it, writes to the two streams."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if file_limit is None else file_limit, hard))
        try:
            code = cli.main(words)
        except BaseException:  # a fault: the test shows it
            traceback.print_exc()
            code = 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read(), "err": err.read(), "torch": "torch" in sys.modules}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder below `folder`: name -> content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def assert_one_line(outcome: Outcome, *wanted: str, notes: int = 0) -> str:
    """One line on stderr that begins with ``error:`` and holds every text of `wanted`; exit code 2; nothing else but `notes` lines before it."""
    lines = outcome.err.splitlines()
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert len(lines) == 1 + notes, outcome.err
    assert lines[-1].startswith("error: ")
    missing = [text for text in wanted if text not in lines[-1]]
    assert not missing, f"{missing} not in {lines[-1]!r}"
    return lines[-1]


if __name__ == "__main__":
    _serve()
