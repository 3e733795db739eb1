"""Where rows come from: jsonl and json files, directories and globs of them, Hugging Face and ModelScope data sets.

Every row keeps its file and line, so that whatever is wrong with it later can be said with its place. Hub libraries are imported only for
a hub id; a local path never contacts anything.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mswift.errors import DataError, MissingExtraError, one_line

SourceKind: TypeAlias = Literal["local", "hf", "ms"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LINE_SUFFIXES = ("", ".jsonl", ".ndjson")
_SUFFIXES = (*_LINE_SUFFIXES, ".json")
_HINT = "check --dataset and --val_dataset"
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One entry of ``--dataset``: a path or hub id, and how many rows to take (``None`` = all)."""

    location: str
    kind: SourceKind
    count: int | None = None

    def __str__(self) -> str:
        prefix = "" if self.kind == "local" else f"{self.kind}::"
        return f"{prefix}{self.location}" + ("" if self.count is None else f"#{self.count}")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the source has it, with its place: the file as given and its line, from 1 (for a hub: the id and the number of the row)."""

    data: dict[str, Any]
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


def parse_spec(text: str, *, use_hf: bool | None = None) -> SourceSpec:
    """Reads ``[hf::|ms::]path_or_id[#N]``.

    A name that exists as a path is local. One of the form ``org/name`` that does not is a hub id: on Hugging Face where ``use_hf`` (or the
    environment's ``USE_HF=1``), else on ModelScope.

    Raises:
        DataError: the name is empty, or what follows ``#`` is not a whole number of at least 1.
    """
    name, count = _split_count(text.strip())
    for kind in ("hf", "ms"):
        if name.startswith(f"{kind}::"):
            return SourceSpec(_not_empty(name[4:], text), kind, count)
    path = os.path.expanduser(_not_empty(name, text))
    is_hub_id = _HUB_ID.fullmatch(name) and Path(name).suffix not in _SUFFIXES[1:] and not os.path.exists(path)
    if not is_hub_id:
        return SourceSpec(path, "local", count)
    if use_hf is None:
        use_hf = os.environ.get("USE_HF", "").lower() in ("1", "true")
    return SourceSpec(name, "hf" if use_hf else "ms", count)


def check_sources(specs: Sequence[str], *, use_hf: bool | None = None) -> None:
    """Look whether the files of all local sources are there and of a kind that `read_file` reads; hubs are not asked.

    Raises:
        DataError: with the first one that is not.
    """
    for spec in (parse_spec(text, use_hf=use_hf) for text in specs):
        for path in _local_files(spec.location) if spec.kind == "local" else ():
            _check_suffix(path)
            if not os.access(path, os.R_OK):
                raise DataError(f"{path}: cannot be read: you have no permission; give yourself read access (chmod u+r)")


def read_source(spec: SourceSpec) -> Iterator[RawRow]:
    """The rows of a source in order, ``#N`` not applied. Raises `DataError` with file and line for what cannot be read."""
    if spec.kind != "local":
        yield from _read_hub(spec)
        return
    for path in _local_files(spec.location):
        yield from read_file(path)


def read_file(path: str) -> Iterator[RawRow]:
    """The rows of one file: one JSON object a line, or for ``.json`` a list of objects as well. Empty lines are skipped.

    Raises:
        DataError: the file cannot be opened, has another suffix, is not UTF-8, or holds something that is no JSON object; with its line.
    """
    _check_suffix(path)
    try:
        if Path(path).suffix.lower() == ".json" and _first_byte(path) == b"[":
            yield from _read_list(path)
        else:
            yield from _read_lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; {_HINT}") from error


def _check_suffix(path: str) -> None:
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"{path}: cannot read {suffix} files, wanted .jsonl (one JSON object a line) or .json (a list of objects); convert it")


def _split_count(text: str) -> tuple[str, int | None]:
    name, mark, number = text.rpartition("#")
    if not mark or os.path.exists(os.path.expanduser(text)):
        return text, None
    if not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise DataError(f"--dataset {text!r}: got {number!r} after #, wanted a whole number of rows of at least 1, such as {name}#500")
    return name, int(number)


def _not_empty(name: str, text: str) -> str:
    if not name:
        raise DataError(f"--dataset {text!r}: the name is empty, wanted a path or a hub id, such as data/train.jsonl or hf::org/name")
    return name


def _local_files(location: str) -> list[str]:
    if os.path.isdir(location):
        for suffix in (".jsonl", ".json"):
            paths = Path(location).rglob(f"*{suffix}")
            found = sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.relative_to(location).parts))
            if found:
                return found
        raise DataError(f"{location}: the directory holds no .jsonl or .json file; {_HINT}")
    if os.path.exists(location):
        return [location]
    if _GLOB.search(location):
        found = sorted(glob.glob(location, recursive=True))
        if found:
            return found
        raise DataError(f"{location}: no file matches this pattern; {_HINT}")
    raise DataError(f"{location}: no such data file or directory (looked in {os.getcwd()}); {_HINT}")


def _first_byte(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_lines(path: str) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            text = _decode(raw, path, number).strip()
            if text:
                yield _row(_parse(text, path, number), path, number)


def _read_list(path: str) -> Iterator[RawRow]:
    """The objects of a JSON list, each with the line on which it begins."""
    with open(path, "rb") as file:
        text = "".join(_decode(raw, path, number) for number, raw in enumerate(file, start=1))
    decoder = json.JSONDecoder()
    at, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _not_json(path, error.lineno, f"{error.msg} at column {error.colno}") from error
        yield _row(value, path, line)
        at = _skip_space(text, at)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            raise _not_json(path, text.count("\n", 0, at) + 1, f"wanted ',' or ']' after a row, got {text[at : at + 1] or 'the end of the file'!r}")
        if not closed:
            at = _skip_space(text, at + 1)
    at = _skip_space(text, at + 1)
    if at < len(text):
        raise _not_json(path, text.count("\n", 0, at) + 1, f"wanted the end of the file after the list, got {text[at]!r}")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _decode(raw: bytes, path: str, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}; convert the file with iconv -t UTF-8"
        ) from error


def _parse(text: str, path: str, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, number, f"{error.msg} at column {error.colno}") from error


def _not_json(path: str, line: int, what: str) -> DataError:
    return DataError(f"{path}:{line}: not JSON: {what}; wanted one JSON object a line (.jsonl) or a list of objects (.json)")


def _row(value: Any, path: str, number: int) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(f'{path}:{number}: a row is a JSON object, got {type(value).__name__}; wanted something like {{"messages": [...]}}')
    return RawRow(value, path, number)


def _read_hub(spec: SourceSpec) -> Iterator[RawRow]:
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # it tells of every attempt to reach the hub; the last one is told below
    load = _load_from_hf if spec.kind == "hf" else _load_from_ms
    try:
        rows = load(spec.location)
    except MissingExtraError:
        raise
    except Exception as error:  # each hub library has an error tree of its own
        raise DataError(
            f"{spec.kind}::{spec.location}: cannot be loaded from the hub: {one_line(error)}; there is no local file or directory of this name either"
        ) from error
    for number, data in enumerate(rows, start=1):
        yield RawRow(dict(data), f"{spec.kind}::{spec.location}", number)


def _load_from_hf(name: str) -> Any:
    return _optional("datasets", "data").load_dataset(name, split="train")


def _load_from_ms(name: str) -> Any:
    """Through a local copy: modelscope's own loader needs an old `datasets` and much else."""
    directory = _optional("modelscope.hub.snapshot_download", "modelscope").dataset_snapshot_download(name)
    return _load_from_hf(directory)


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.partition(".")[0], extra) from error
