"""Tests of several processes: `run_distributed` runs a function of a test file on real gloo ranks and brings back what they return or raise.

Processes are forked from one server that has torch imported already, so a world starts in well under a second after the first.
A world that hangs fails with the stack of every rank instead of blocking the test run.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_GRACE = 3.0  # seconds that the other ranks have to end by themselves once one has failed


class RankError(RuntimeError):
    """A rank of a `run_distributed` world failed; ``rank`` is the first one that did."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on ``world_size`` processes with torch.distributed (gloo) set up; returns the results by rank.

    Args:
        fn: a function at the top level of a test file. args: anything that pickles; results must pickle too.
        timeout: seconds for the whole world. The environment of the caller is that of the ranks, with RANK, WORLD_SIZE and LOCAL_RANK added.

    Raises:
        RankError: a rank raised (its traceback is the message), died, or was still running at the timeout (its stack is the message).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "args").write_bytes(pickle.dumps(args))
        where = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, where, folder, dict(os.environ), timeout), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, folder, time.monotonic() + timeout)
        outcomes = [_outcome(folder, rank, process) for rank, process in enumerate(ranks)]
    failed = [(ended, rank, text) for rank, (ended, ok, text) in enumerate(outcomes) if not ok]
    if failed:
        _, rank, text = min(failed)
        raise RankError(rank, text)
    return [value for _, _, value in outcomes]


def _wait(ranks: list[BaseProcess], folder: Path, deadline: float) -> None:
    """Until all have ended; soon after the first failure, and at the deadline, the rest are ended."""
    while (alive := [process for process in ranks if process.is_alive()]) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE)
        alive[0].join(0.02)
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()


def _outcome(folder: Path, rank: int, process: BaseProcess) -> tuple[float, bool, Any]:
    """(when it ended, whether it returned, its result or what went wrong)."""
    written = folder / f"result-{rank}"
    if written.exists():
        return pickle.loads(written.read_bytes())
    stack = (folder / f"stack-{rank}").read_text() if (folder / f"stack-{rank}").exists() else ""
    if process.exitcode == -9:
        return float("inf"), False, f"was still running at the end and was killed\n{stack}"
    return 0.0, False, f"died with exit code {process.exitcode}\n{stack}"


def _rank_main(rank: int, world_size: int, where: tuple[str, str, str], folder: Path, environment: dict[str, str], timeout: float) -> None:
    import torch
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    stack = open(folder / f"stack-{rank}", "w")  # noqa: SIM115 (faulthandler writes to it at any time)
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(max(timeout - 1.0, 0.5), file=stack)
    try:
        fn = _load(*where)
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
        result = fn(rank, world_size, *pickle.loads((folder / "args").read_bytes()))
        dist.barrier()
        dist.destroy_process_group()
        outcome = pickle.dumps((time.time(), True, result))
    except BaseException:
        outcome = pickle.dumps((time.time(), False, traceback.format_exc()))
    draft = folder / f"draft-{rank}"
    draft.write_bytes(outcome)
    draft.rename(folder / f"result-{rank}")
    os._exit(0 if pickle.loads(outcome)[1] else 1)  # no waiting for threads of a broken process group


def _load(module: str, filename: str, name: str) -> Callable[..., Any]:
    """The function again in the rank, from its file: how the test runner named and imported that file makes no difference."""
    if module not in sys.modules and module.startswith("mswift"):
        importlib.import_module(module)
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, filename)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    found: Callable[..., Any] = getattr(sys.modules[module], name)
    return found
