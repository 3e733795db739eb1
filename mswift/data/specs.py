"""What an entry of ``--dataset`` says: ``[hf::|ms::]path_or_id[:subset/subset][#N][@weight]``."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from mswift.errors import DataError

SourceKind: TypeAlias = Literal["local", "hf", "ms"]

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*LINE_SUFFIXES, ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
"""Endings of files that are read, from the one that a folder is searched for first."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
HINT = "check --dataset and --val_dataset"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUBSETS = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One entry of ``--dataset``.

    Args:
        location: a path, or a hub's id. kind: where it lives. count: rows of an epoch; ``None`` = all.
        subsets: configurations of a hub's data set; ``("all",)`` for every one. weight: its share of a mixture, not normalised.
    """

    location: str
    kind: SourceKind
    count: int | None = None
    subsets: tuple[str, ...] = ()
    weight: float | None = None

    @property
    def name(self) -> str:
        """The entry without count and weight."""
        prefix = "" if self.kind == "local" else f"{self.kind}::"
        return f"{prefix}{self.location}" + (f":{'/'.join(self.subsets)}" if self.subsets else "")

    def __str__(self) -> str:
        count = "" if self.count is None else f"#{self.count}"
        return f"{self.name}{count}" + ("" if self.weight is None else f"@{self.weight:g}")


def parse_spec(text: str, *, use_hf: bool | None = None) -> SourceSpec:
    """Reads ``[hf::|ms::]path_or_id[:subset/subset][#N][@weight]``.

    A name that exists as a path is local. One of the form ``org/name`` that does not is a hub id: on Hugging Face where ``use_hf`` (or the
    environment's ``USE_HF=1``), else on ModelScope. Only a hub's data set has subsets.

    Raises:
        DataError: the name is empty, what follows ``#`` is not a whole number of at least 1, or the weight is not a number above 0.
    """
    stripped = text.strip()
    whole, weight = _split_weight(stripped)
    name, count = _split_count(whole)
    for kind in ("hf", "ms"):
        if name.startswith(f"{kind}::"):
            location, subsets = _split_subsets(name[4:])
            return SourceSpec(_not_empty(location, text), kind, count, subsets, weight)
    path = os.path.expanduser(_not_empty(name, text))
    identifier, subsets = _split_subsets(name)
    is_hub_id = _HUB_ID.fullmatch(identifier) and suffix_of(identifier) not in SUFFIXES and not os.path.exists(path)
    if not is_hub_id:
        return SourceSpec(path, "local", count, (), weight)
    if use_hf is None:
        use_hf = os.environ.get("USE_HF", "").lower() in ("1", "true")
    return SourceSpec(identifier, "hf" if use_hf else "ms", count, subsets, weight)


def suffix_of(path: str) -> str:
    """The ending that says what is in a file, without that of its compression, in lower case."""
    return (Path(Path(path).stem) if compression_of(path) else Path(path)).suffix.lower()


def compression_of(path: str) -> str | None:
    return COMPRESSIONS.get(Path(path).suffix.lower())


def check_suffix(path: str) -> None:
    """Raises `DataError` where `path` is not of a kind that is read."""
    suffix = suffix_of(path)
    if suffix and suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read {suffix} files, wanted one of {', '.join(SUFFIXES)} (also as .gz, .zst or .bz2); convert it")


def local_files(location: str) -> list[str]:
    """The files of a path, a folder or a pattern, in the order of their names.

    Raises:
        DataError: there are none.
    """
    if os.path.isdir(location):
        root = Path(location)
        hidden = (path for path in root.rglob("*") if not any(part.startswith((".", "_")) for part in path.relative_to(root).parts))
        files = sorted(str(path) for path in hidden if path.is_file())
        for suffix in SUFFIXES:
            found = [path for path in files if suffix_of(path) == suffix]
            if found:
                return found
        raise DataError(f"{location}: the directory holds no file that is read ({', '.join(SUFFIXES)}); {HINT}")
    if os.path.exists(location):
        return [location]
    if _GLOB.search(location):
        found = sorted(path for path in glob.glob(location, recursive=True) if os.path.isfile(path))
        if found:
            return found
        raise DataError(f"{location}: no file matches this pattern; {HINT}")
    raise DataError(f"{location}: no such data file or directory (looked in {os.getcwd()}); {HINT}")


def _split_weight(text: str) -> tuple[str, float | None]:
    name, mark, number = text.rpartition("@")
    if not mark or os.path.exists(os.path.expanduser(text)) or not re.fullmatch(r"[\d.eE+-]*", number):
        return text, None
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise DataError(f"--dataset {text!r}: got {number!r} after @, wanted a weight above 0, such as {name}@0.7")
    return name, weight


def _split_count(text: str) -> tuple[str, int | None]:
    name, mark, number = text.rpartition("#")
    if not mark or os.path.exists(os.path.expanduser(text)):
        return text, None
    if not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise DataError(f"--dataset {text!r}: got {number!r} after #, wanted a whole number of rows of at least 1, such as {name}#500")
    return name, int(number)


def _split_subsets(name: str) -> tuple[str, tuple[str, ...]]:
    location, mark, subsets = name.rpartition(":")
    if not mark or not location or not _SUBSETS.fullmatch(subsets):
        return name, ()
    return location, tuple(subsets.split("/"))


def _not_empty(name: str, text: str) -> str:
    if not name:
        raise DataError(f"--dataset {text!r}: the name is empty, wanted a path or a hub id, such as data/train.jsonl or hf::org/name")
    return name
