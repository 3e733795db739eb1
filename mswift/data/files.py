"""Rows of one file, with their places: lines of JSON, a JSON list, csv, plain text, parquet and arrow, compressed or not.

The number of a row is its line for formats of lines (from 1), and the row itself for parquet and arrow (from 1).
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from mswift.data.specs import HINT, check_suffix, compression_of, suffix_of
from mswift.errors import DataError, one_line

OnBad: TypeAlias = Callable[[DataError], None]

_BATCH = 1024  # rows that parquet decodes together
_LARGEST_CELL = 1 << 30


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the source has it, with its place: the file as given and its line, from 1 (for a hub, parquet and arrow: the number of the row)."""

    data: dict[str, Any]
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


def stop(error: DataError) -> None:
    """What becomes of a bad line where nobody counts them."""
    raise error


def read_file(path: str, on_bad: OnBad = stop) -> Iterator[RawRow]:
    """The rows of one file, by its ending; a file without one holds a JSON object a line. Empty lines are skipped.

    Args:
        on_bad: is called with the error of a line that is no row, where the lines after it can be read all the same.

    Raises:
        DataError: the file cannot be opened, has another suffix, is not UTF-8, or holds something that is no row; with its line.
    """
    check_suffix(path)
    try:
        yield from _READERS.get(suffix_of(path), read_lines)(path, on_bad)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or one_line(error)}; {HINT}") from error
    except EOFError as error:
        raise DataError(f"{path}: cannot be read: it ends early ({one_line(error)}); copy it again") from error


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of a file of text, decompressed.

    Raises:
        DataError: it begins as UTF-16 or UTF-32 does, so that none of its lines could be read.
    """
    compression = compression_of(path)
    if compression is None:
        with open(path, "rb") as file:
            _check_encoding(path, file.peek(4)[:4])
            yield file
    else:
        arrow = importlib.import_module("pyarrow")  # not before a file needs it: half a second
        with arrow.input_stream(path, compression=compression) as stream, io.BufferedReader(_Readable(stream), 1 << 20) as file:
            _check_encoding(path, file.peek(4)[:4])
            yield file


def _check_encoding(path: str, head: bytes) -> None:
    zeros = [byte == 0 for byte in head[:4]]
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        name, at = "UTF-32", 0
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name, at = "UTF-16", 0
    elif zeros in ([False, True, False, True], [True, False, True, False]):
        name, at = ("UTF-16BE", 0) if zeros[0] else ("UTF-16LE", 1)
    else:
        return
    raise _not_utf8(path, 1, head[at], at, at, f"-f {name} ")


class _Readable(io.RawIOBase):
    """A pyarrow stream as Python's buffered reader wants it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def read_lines(path: str, on_bad: OnBad = stop) -> Iterator[RawRow]:
    """A JSON object a line."""
    return _each_line(path, on_bad, parse_line)


def _read_text(path: str, on_bad: OnBad) -> Iterator[RawRow]:
    return _each_line(path, on_bad, parse_text)


def _each_line(path: str, on_bad: OnBad, parse: Callable[[bytes, str, int, int], RawRow | None]) -> Iterator[RawRow]:
    offset = 0
    with open_bytes(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                row = parse(raw, path, number, offset)
                if row is not None:
                    yield row
            except DataError as error:
                on_bad(error)
            offset += len(raw)


def parse_line(raw: bytes, path: str, number: int, offset: int = 0) -> RawRow | None:
    """The row of a line; None for an empty one.

    Args:
        offset: bytes before the line.

    Raises:
        DataError: the line is not UTF-8, or no JSON object.
    """
    text = decode(raw, path, number, offset).strip()
    if not text:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, number, f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _not_json(path, number, "nested too deeply") from error
    return _row(value, path, number)


def parse_text(raw: bytes, path: str, number: int, offset: int = 0) -> RawRow | None:
    """A line of plain text as the row of its text; None for an empty one."""
    text = decode(raw, path, number, offset).rstrip("\r\n")
    return RawRow({"text": text}, path, number) if text.strip() else None


def decode(raw: bytes, path: str, number: int, offset: int = 0) -> str:
    """A line as text.

    Raises:
        DataError: it is not UTF-8; with the byte and its place.
    """
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        at = error.start + len(raw) - len(error.object)
        raise _not_utf8(path, number, raw[at], at, offset + at) from error


def _decoded(file: io.BufferedReader[Any], path: str) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        yield decode(raw, path, number, offset)
        offset += len(raw)


def _read_json(path: str, on_bad: OnBad) -> Iterator[RawRow]:
    with open_bytes(path) as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    yield from _read_list(path, on_bad) if first == b"[" else read_lines(path, on_bad)


def _read_list(path: str, on_bad: OnBad) -> Iterator[RawRow]:
    """The objects of a JSON list, each with the line on which it begins."""
    with open_bytes(path) as file:
        text = "".join(_decoded(file, path))
    decoder = json.JSONDecoder()
    at, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _not_json(path, error.lineno, f"{error.msg} at column {error.colno}") from error
        try:
            yield _row(value, path, line)
        except DataError as error:
            on_bad(error)
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


def _read_csv(path: str, on_bad: OnBad) -> Iterator[RawRow]:
    """Rows by the names in the first line; an empty cell is a column that the row does not have."""
    csv.field_size_limit(_LARGEST_CELL)
    with open_bytes(path) as file:
        reader = csv.reader(_decoded(file, path), delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            begin = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    wanted = f"the first line has {len(header)} names"
                    on_bad(DataError(f"{path}:{begin}: has {len(cells)} cells, {wanted}; put quotes around cells with commas"))
                elif cells:
                    yield RawRow({name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}, path, begin)
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not csv: {one_line(error)}; put quotes around commas and line breaks") from error


def _read_parquet(path: str, on_bad: OnBad) -> Iterator[RawRow]:
    with open_parquet(path) as file:
        number = 0
        for batch in file.iter_batches(_BATCH):
            for data in batch.to_pylist():
                number += 1
                yield RawRow(data, path, number)


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile``.

    Raises:
        DataError: it is none, or damaged.
    """
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except arrow.ArrowException as error:
        raise DataError(f"{path}: not parquet, or damaged: {one_line(error)}; copy it again") from error


def _read_arrow(path: str, on_bad: OnBad) -> Iterator[RawRow]:
    number = 0
    for batch in open_arrow(path).to_batches(max_chunksize=_BATCH):
        for data in batch.to_pylist():
            number += 1
            yield RawRow(data, path, number)


def open_arrow(path: str) -> Any:
    """An arrow file (of either kind: random access or stream) as a table in mapped memory.

    Raises:
        DataError: it is none, or damaged.
    """
    arrow = importlib.import_module("pyarrow")
    mapped = arrow.memory_map(path)
    try:
        try:
            return arrow.ipc.open_file(mapped).read_all()
        except arrow.ArrowInvalid:
            mapped.seek(0)
            return arrow.ipc.open_stream(mapped).read_all()
    except arrow.ArrowException as error:
        raise DataError(f"{path}: not arrow, or damaged: {one_line(error)}; copy it again") from error


def _not_utf8(path: str, line: int, byte: int, column: int, at: int, source: str = "") -> DataError:
    found = f"byte 0x{byte:02x} at column {column + 1} (byte {at} of the file)"
    return DataError(f"{path}:{line}: not UTF-8: {found}; convert the file with iconv {source}-t UTF-8")


def _not_json(path: str, line: int, what: str) -> DataError:
    return DataError(f"{path}:{line}: not JSON: {what}; wanted one JSON object a line (.jsonl) or a list of objects (.json)")


def _row(value: Any, path: str, number: int) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(f'{path}:{number}: a row is a JSON object, got {type(value).__name__}; wanted something like {{"messages": [...]}}')
    return RawRow(value, path, number)


_READERS: dict[str, Callable[[str, OnBad], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
