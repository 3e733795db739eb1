"""Logging that knows its rank: rank 0 speaks to the user, the others only when something is wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator


def rank() -> int:
    """The global rank that torchrun or Slurm gave this process; 0 where there is only one. (`mswift.launch` refuses one that is no number.)"""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def is_main_process() -> bool:
    return rank() == 0


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        where = f"[rank {rank()}] " if rank() else ""
        return f"{where}{prefix}{super().format(record)}"


def get_logger(name: str) -> logging.Logger:
    """A logger under ``mswift.``; INFO on rank 0 and WARNING elsewhere, overridden by LOG_LEVEL."""
    root = logging.getLogger("mswift")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(message)s"))
        root.addHandler(handler)
        root.propagate = False
        root.setLevel(os.environ.get("LOG_LEVEL", "INFO" if is_main_process() else "WARNING").upper())
    return root if name == "mswift" else root.getChild(name.removeprefix("mswift."))


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the main process's terminal; the block gets ``update(done, total)``. Nothing is drawn into a file or by other ranks."""
    if not (is_main_process() and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
