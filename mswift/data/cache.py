"""Cached data sets: tokens on disk that are memory-mapped, with a manifest that says what they were made of.

A directory with ``ids.npy`` (int32), ``weights.npy`` (float32), ``offsets.npy`` (int64 ``[rows + 1]``: where each row begins), ``places.npy``
(int64 ``[rows, 2]``: number of the source, line) and ``manifest.json``. It appears by one rename. Of preference rows (mode ``rlhf``) the chosen
and the rejected conversation lie side by side, as two rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.data.encoded import Ids, Integers, Places, TokenArrays, TokenRows, Weights, content_of_digests, join, rows_of_arrays
from mswift.data.report import LengthReport, SourceCount
from mswift.data.rows import Row
from mswift.errors import DataError, one_line

MANIFEST = "manifest.json"
VERSION = 1
Mode: TypeAlias = Literal["train", "rlhf"]
_HOLDS = {"train": "rows of one answer", "rlhf": "preference rows"}
_TOGETHER = {"train": 1, "rlhf": 2}  # rows that count as one
_AGAIN = "make it again with mswift export --to_cached_dataset true"
_END_BYTES = 65536  # of a source file that its fingerprint reads at either end


class _Column:
    """One .npy file that grows, and the digest of what is in it."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, columns: int = 0) -> None:
        self.dtype, self.columns, self.length, self.digest = np.dtype(dtype), columns, 0, hashlib.sha256()
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def add(self, array: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(array, self.dtype).data
        self._file.write(data)
        self.digest.update(data)
        self.length += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()  # numpy leaves room for a longer first dimension
        self._file.close()

    def _write_header(self) -> None:
        shape = (self.length, self.columns) if self.columns else (self.length,)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class CacheSink:
    """Writes rows to a cached data set while they are made; memory holds one chunk.

    Args:
        directory: the data set; it appears, in the place of what was there, when `finish` is called.
        identity: what tokens depend on; see `mswift.templates.ChatTemplate.identity`. files: the sources on this machine.
        mode: what the rows are.
    """

    def __init__(self, directory: Path, identity: Mapping[str, str], files: Sequence[str], mode: Mode = "train") -> None:
        self.directory, self.identity, self.files, self.mode = directory, dict(identity), list(files), mode
        self.draft = directory.with_name(f".{directory.name}.incomplete")
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)
        self._ids, self._weights = _Column(self.draft / "ids.npy", np.int32), _Column(self.draft / "weights.npy", np.float32)
        self._offsets, self._places = _Column(self.draft / "offsets.npy", np.int64), _Column(self.draft / "places.npy", np.int64, 2)
        self._offsets.add(np.zeros(1, np.int64))
        self._names, self._end, self._longest = Places(), 0, 0

    def add(self, ids: Ids, weights: Weights, lengths: Integers, origins: Sequence[Row]) -> None:
        try:
            self._ids.add(ids)
            self._weights.add(weights)
            self._offsets.add(self._end + np.cumsum(lengths))
            self._places.add(self._names.of(origins))
        except OSError as error:
            self.remove()
            raise DataError(f"{self.directory} cannot be written: {one_line(error)}; free some space or give another --output_dir") from error
        self._end += int(lengths.sum())
        self._longest = max(self._longest, int(lengths.max(initial=0)))

    def finish(self, report: LengthReport) -> TokenRows:
        for column in (self._ids, self._weights, self._offsets, self._places):
            column.close()
        manifest = {
            "version": VERSION,
            "template_mode": self.mode,
            "rows": self._places.length,
            "tokens": self._end,
            "longest": self._longest,
            "max_length": report.max_length,
            "truncation_strategy": report.truncation,
            "identity": self.identity,
            "content": content_of_digests(*(column.digest.digest() for column in (self._ids, self._weights, self._offsets))),
            "sources": list(self._names.numbers),
            "files": {str(Path(path).absolute()): file_fingerprint(path) for path in self.files},
            "kept": {name: count.kept for name, count in report.sources.items()},
            "report": report.lines(),
        }
        report.write(self.draft)
        (self.draft / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
        shutil.rmtree(self.directory, ignore_errors=True)
        os.replace(self.draft, self.directory)
        return open_cached(self.directory, self.mode)

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.draft, ignore_errors=True)


def file_fingerprint(path: str | Path) -> str:
    """Size of a file, and a digest of its first and last 64 KiB."""
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()[:16]}"


def find_cached(name: str, part: str = "train") -> tuple[Path, int | None]:
    """``DIR[#N]`` -> (directory of the data set: DIR or its `part`, N).

    Raises:
        DataError: there is none.
    """
    text, _, count = name.partition("#")
    if count and not (count.isdecimal() and int(count)):
        raise DataError(f"{name}: wanted a whole number of rows after #, got {count!r}")
    for directory in (Path(text).expanduser(), Path(text).expanduser() / part):
        if (directory / MANIFEST).is_file():
            return directory, int(count) if count else None
    raise DataError(f"{text} is no cached data set (there is no {MANIFEST} in it or in its folder {part}); {_AGAIN}")


def read_manifest(directory: Path, mode: Mode = "train") -> dict[str, Any]:
    """The manifest of a cached data set.

    Raises:
        DataError: it cannot be read, is of another version, or of rows of another mode.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}; {_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise DataError(f"{path} is of another version, wanted {VERSION}; {_AGAIN}")
    found = manifest.get("template_mode", "train")
    if found != mode:
        raise DataError(f"{directory} holds {_HOLDS[found]}, wanted {_HOLDS[mode]}; {_AGAIN} --template_mode {mode}")
    return manifest


def check_cached(directory: Path, identity: Mapping[str, str], max_length: int | None) -> None:
    """Refuse tokens that this run would not make.

    Raises:
        DataError: another tokenizer, template or setting, a source that has changed since, or rows longer than this run takes.
    """
    manifest = read_manifest(directory)
    for what, value in identity.items():
        if manifest["identity"].get(what) != value:
            raise DataError(f"{directory} was made with another {what} than this run has; {_AGAIN} and the same flags")
    for path, known in manifest["files"].items():
        if os.path.exists(path) and file_fingerprint(path) != known:
            raise DataError(f"{directory} was made from {path}, which has changed since; {_AGAIN}")
    if max_length is not None and manifest["longest"] > max_length:
        raise DataError(f"{directory} has rows of {manifest['longest']} tokens, more than --max_length {max_length}; raise it, or {_AGAIN}")


def open_cached(directory: Path, mode: Mode = "train") -> TokenRows:
    """The rows of a cached data set, memory-mapped.

    Raises:
        DataError: a file is missing or does not fit the manifest, or the rows are of another mode.
    """
    manifest = read_manifest(directory, mode)
    try:
        ids, weights, places = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("ids", "weights", "places"))
        offsets = np.load(directory / "offsets.npy")
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} is damaged: {one_line(error)}; {_AGAIN}") from error
    found = (len(offsets) - 1, len(places), len(ids), len(weights))
    wanted = (manifest["rows"], manifest["rows"], manifest["tokens"], manifest["tokens"])
    if found != wanted or int(offsets[-1]) != manifest["tokens"]:
        raise DataError(f"{directory} is damaged: its files have {found} rows, rows, tokens and weights, its manifest {wanted}; {_AGAIN}")
    report = LengthReport(manifest["max_length"], manifest["truncation_strategy"])
    report.sources = {name: SourceCount(kept=kept) for name, kept in manifest["kept"].items()}
    return rows_of_arrays(TokenArrays(ids, weights, manifest["sources"], places, manifest["content"]), np.diff(offsets), report)


def load_cached(names: Sequence[str], *, part: str = "train", seed: int = 42, shuffle: bool = True, mode: Mode = "train") -> TokenRows:
    """All rows of several cached data sets; ``DIR#N`` takes N of one, as `load_dataset` takes rows of a source; of pairs N pairs.

    Raises:
        DataError: one is missing or damaged.
    """
    found = []
    for number, name in enumerate(names):
        directory, count = find_cached(name, part)
        data = open_cached(directory, mode)
        if count is not None:
            together = _TOGETHER[mode]
            units = len(data) // together
            passes, rest = divmod(count, units)
            order = np.random.default_rng([seed, number]).permutation(units) if shuffle else np.arange(units)
            chosen = np.concatenate([np.tile(np.arange(units), passes), order[:rest]])
            data = data.choose((together * chosen[:, None] + np.arange(together)).ravel())
        found.append(data)
    return join(found, found[0].report)
