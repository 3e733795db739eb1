"""Directories that appear whole or not at all: written beside the target under a temporary name, then renamed once."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mswift.errors import ConversionError

_OURS = ("config.json", "adapter_config.json")  # of any model that we wrote
DRAFT_NOTE = ".identity.json"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, slots=True)
class TextFile:
    """A small file that is written beside an export, rather than copied."""

    name: str
    text: str


SmallFile: TypeAlias = str | Path | TextFile
"""One to be copied by its name, or one to be written."""


def missing_files(files: Iterable[SmallFile]) -> list[str]:
    """Those to be copied that are not there."""
    return [str(file) for file in files if not isinstance(file, TextFile) and not Path(file).is_file()]


def put_files(files: Iterable[SmallFile], directory: Path) -> None:
    """Copy or write small files into a directory, each by its name."""
    for file in files:
        if isinstance(file, TextFile):
            (directory / file.name).write_text(file.text, encoding="utf8")
        else:
            shutil.copyfile(file, directory / Path(file).name)


def parse_size(size: str | int) -> int:
    """Bytes from ``5GB`` (10^9), ``5GiB`` (2^30) or a number.

    Raises:
        ConversionError: not a size, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", str(size).upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count <= 0:
        raise ConversionError(f"size {size!r} is not understood; write a number of bytes, 500MB, 5GB or 5GiB")
    return count


def check_target(directory: Path, exist_ok: bool) -> None:
    """Refuse a target that would overwrite something.

    Raises:
        ConversionError: a file, or a directory that is not empty; with ``exist_ok``, one that holds no earlier export.
    """
    if directory.exists() and not directory.is_dir():
        raise ConversionError(f"output {directory} is a file; give a directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not exist_ok:
        raise ConversionError(f"output directory {directory} is not empty; choose another one or allow it to be replaced")
    if not any((directory / name).is_file() for name in _OURS):
        raise ConversionError(f"output directory {directory} holds something other than a model ({' or '.join(_OURS)}); choose another one")


def replace_file(path: Path, text: str) -> None:
    """Write a small file anew; on a full disk the old one stays."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def check_space(directory: Path, nbytes: int) -> None:
    """Refuse to begin what cannot be finished; ``directory`` exists.

    Raises:
        ConversionError: less than ``nbytes`` are free.
    """
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise ConversionError(
            f"{nbytes / 1e9:.2f} GB are to be written and {directory} has {free / 1e9:.2f} GB free; free some or choose another disk"
        )


def make_temporary(directory: Path) -> Path:
    """A new directory beside ``directory``, readable like any other; missing parents are made."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
    except OSError as error:
        raise ConversionError(f"cannot write beside {directory}: {error.strerror}; choose another output directory") from None
    return temporary


def stamp_of(directory: Path) -> list[list[object]]:
    """What tells the files of a source from those of another: names, sizes and times of change, folders below included."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [[str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def draft_of(directory: Path) -> Path:
    """Where a draft of ``directory`` lies that outlives its process."""
    return directory.with_name(f".{directory.name}.partial")


def begin_draft(directory: Path, identity: dict[str, object], resume: bool) -> Path:
    """Make `draft_of`, for work that is gone on with after its process was killed; one process calls it.

    Args:
        identity: of JSON types; must be the same when it is gone on with. resume: keep a draft that is there; otherwise it is begun anew.

    Raises:
        ConversionError: the draft that is there is of something else, or none can be made.
    """
    draft, told = draft_of(directory), json.loads(json.dumps(identity))
    note = draft / DRAFT_NOTE
    try:
        if draft.is_dir() and not resume:
            shutil.rmtree(draft)
        draft.mkdir(parents=True, exist_ok=True)
        kept = json.loads(note.read_text(encoding="utf8")) if note.is_file() else None
        if kept not in (None, told):
            raise ConversionError(f"{draft} was begun from another source, dtype or layout; give those again, or leave --resume out to begin anew")
        if kept is None:
            replace_file(note, json.dumps(told))
    except OSError as error:
        raise ConversionError(f"cannot write beside {directory}: {error.strerror}; choose another output directory") from None
    return draft


def publish(temporary: Path, directory: Path) -> None:
    """Make ``temporary`` appear as ``directory`` by a rename; what was there goes away only afterwards."""
    old = temporary.with_suffix(".old")
    (temporary / DRAFT_NOTE).unlink(missing_ok=True)
    try:
        if directory.is_dir() and any(directory.iterdir()):
            os.rename(directory, old)
        try:
            os.rename(temporary, directory)
        except OSError:
            if old.is_dir():
                os.rename(old, directory)
            raise
    except OSError as error:
        raise ConversionError(f"cannot make {directory} visible: {error.strerror}; choose another output directory") from None
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged(directory: Path, exist_ok: bool = False, nbytes: int = 0) -> Iterator[Path]:
    """For one process: yields the temporary directory, publishes it at the end, removes it on any error.

    Raises:
        ConversionError: the target is taken, the disk is full, or a file cannot be written.
    """
    check_target(directory, exist_ok)
    temporary = make_temporary(directory)
    try:
        check_space(temporary, nbytes)
        yield temporary
        publish(temporary, directory)
    except OSError as error:
        raise ConversionError(f"cannot write {directory}: {error.strerror}; free some space or choose another directory") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
