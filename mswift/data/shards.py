"""Sources that are too large to be held: an index of where pieces of them begin, and readers that take rows out of the middle.

A chunk is what can be reached without reading what is before it: some lines of a file of lines, a row group of parquet, some rows of arrow or
of a hub's data set, and a whole file of any other kind (compressed, csv, a JSON list). The index has a few numbers for each chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.data.files import RawRow, open_arrow, open_bytes, open_parquet, parse_line, parse_text, read_file
from mswift.data.hubs import open_hub
from mswift.data.registry import Part
from mswift.data.specs import HINT, LINE_SUFFIXES, compression_of, local_files, suffix_of
from mswift.errors import DataError

Item: TypeAlias = RawRow | DataError | None
"""A row, what is wrong with it, or nothing (a line of blanks)."""
Integers: TypeAlias = npt.NDArray[np.int64]
Exchange: TypeAlias = Callable[[Any], list[Any]]

LINES_OF_A_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of some files, in order.

    Attributes:
        files: of each chunk the number of its file. rows: how many it has. starts: the byte at which it begins, or its number in the file.
        lines: the line, or the row, that comes before it.
    """

    files: Integers
    rows: Integers
    starts: Integers
    lines: Integers

    @staticmethod
    def join(parts: Sequence[Chunks]) -> Chunks:
        return Chunks(*(np.concatenate([part.columns()[i] for part in parts] or [np.zeros(0, np.int64)]) for i in range(4)))

    def columns(self) -> tuple[Integers, Integers, Integers, Integers]:
        return self.files, self.rows, self.starts, self.lines


@dataclass(frozen=True, slots=True)
class Shards:
    """A source in chunks.

    Args:
        part: what is read, and how its rows are understood. names: of its files. chunks: of all of them. tables: of a hub, in mapped memory.
    """

    part: Part
    names: list[str]
    chunks: Chunks
    tables: list[Any]

    @property
    def num_rows(self) -> int:
        return int(self.chunks.rows.sum())

    @property
    def can_seek(self) -> bool:
        """Whether all of it is in small chunks, so that reading here and there costs little."""
        return bool(self.tables) or all(_is_lines(name) or suffix_of(name) == ".arrow" for name in self.names)

    def fingerprint(self) -> str:
        """Of names, sizes and the index; not of every byte."""
        sizes = [os.path.getsize(name) if os.path.isfile(name) else 0 for name in self.names]
        digest = hashlib.sha256(repr([(os.path.basename(name), size) for name, size in zip(self.names, sizes, strict=True)]).encode())
        for column in self.chunks.columns():
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


def open_shards(part: Part, *, exchange: Exchange | None = None, rank: int = 0, world: int = 1) -> Shards:
    """The index of a source: one pass over what has no index of its own; each of `world` processes looks at its share of the files.

    Args:
        exchange: gives what every process has found to all of them, in the order of ranks; None: there is one.

    Raises:
        DataError: it holds no rows, or cannot be read; on every process.
    """
    if part.spec.kind != "local":
        tables = open_hub(part.spec, part.split)
        chunks = Chunks.join([_in_pieces(number, len(table)) for number, table in enumerate(tables)])
        return Shards(part, [part.spec.name] * len(tables), chunks, tables)
    names = local_files(part.spec.location)
    found: list[tuple[int, Chunks]] | DataError
    try:
        found = [(number, index_file(names[number], number)) for number in range(rank, len(names), world)]
    except DataError as error:
        found = error
    indexed: list[tuple[int, Chunks]] = []
    for one in [found] if exchange is None else exchange(found):
        if isinstance(one, DataError):
            raise one
        indexed += one
    chunks = Chunks.join([chunk for _, chunk in sorted(indexed, key=lambda pair: pair[0])])
    if not int(chunks.rows.sum()):
        raise DataError(f"{part.spec.name}: holds no rows; check --dataset")
    return Shards(part, names, chunks, [])


def index_file(path: str, number: int = 0) -> Chunks:
    """The chunks of one file. Raises `DataError` where it cannot be read."""
    try:
        if _is_lines(path):
            return _index_lines(path, number)
        if suffix_of(path) == ".parquet":
            with open_parquet(path) as file:
                rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            return _chunks(number, rows, list(range(len(rows))), list(itertools.accumulate(rows, initial=0))[:-1])
        if suffix_of(path) == ".arrow":
            return _in_pieces(number, open_arrow(path).num_rows)
        return _chunks(number, [sum(1 for _ in each_item(path))], [0], [0])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; {HINT}") from error


def _chunks(number: int, rows: Sequence[int], starts: Sequence[int], lines: Sequence[int]) -> Chunks:
    columns = (np.asarray(column, np.int64) for column in ([number] * len(rows), rows, starts, lines))
    return Chunks(*columns)


def _in_pieces(number: int, rows: int) -> Chunks:
    begins = range(0, rows, LINES_OF_A_CHUNK)
    return _chunks(number, [min(LINES_OF_A_CHUNK, rows - begin) for begin in begins], [0] * len(begins), list(begins))


def _index_lines(path: str, number: int) -> Chunks:
    counts, starts, lines = list[int](), list[int](), list[int]()
    in_chunk, offset = LINES_OF_A_CHUNK, 0
    with open_bytes(path) as file:
        for line, raw in enumerate(file):
            if raw.strip():
                if in_chunk == LINES_OF_A_CHUNK:
                    counts.append(0)
                    starts.append(offset)
                    lines.append(line)
                    in_chunk = 0
                in_chunk += 1
                counts[-1] = in_chunk
            offset += len(raw)
    return _chunks(number, counts, starts, lines)


def _is_lines(path: str) -> bool:
    if compression_of(path) is not None or suffix_of(path) not in (*LINE_SUFFIXES, "", ".txt", ".json"):
        return False
    if suffix_of(path) != ".json":
        return True
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"["


def each_item(path: str) -> Iterator[Item]:
    """Every row of a file of any kind and every fault of a line, in order; as many as its chunks have rows."""
    if suffix_of(path) in (*LINE_SUFFIXES, "", ".txt"):
        with open_bytes(path) as file:
            yield from (_parsed(path, raw, line, offset) for raw, line, offset in _lines(file, 0, 0))
        return
    faults: list[DataError] = []
    for row in read_file(path, faults.append):
        yield from faults
        faults.clear()
        yield row
    yield from faults


def _lines(file: Any, line: int, offset: int) -> Iterator[tuple[bytes, int, int]]:
    for raw in file:
        line += 1
        if raw.strip():
            yield raw, line, offset
        offset += len(raw)


def _parsed(path: str, raw: bytes, line: int, offset: int) -> Item:
    try:
        return (parse_text if suffix_of(path) == ".txt" else parse_line)(raw, path, line, offset)
    except DataError as error:
        return error


class ChunkReader:
    """Takes rows out of chunks; remembers where it stands in a file that can only be read from its beginning, so give each reader its own."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._open: tuple[int, int, Iterator[Item]] | None = None  # chunk, rows taken, the rest of it

    def read(self, chunk: int, first: int, count: int) -> list[Item]:
        """Rows ``[first, first + count)`` of a chunk.

        Raises:
            DataError: the file cannot be read, or has fewer rows than when it was indexed.
        """
        chunks = self.shards.chunks
        number, start, line = int(chunks.files[chunk]), int(chunks.starts[chunk]), int(chunks.lines[chunk])
        path = self.shards.names[number]
        try:
            if self.shards.tables:
                items = _of_table(self.shards.tables[number], path, line + first, count)
            elif _is_lines(path):
                with open(path, "rb") as file:
                    file.seek(start)
                    taken = itertools.islice(_lines(file, line, start), first, first + count)
                    items = [_parsed(path, raw, at, offset) for raw, at, offset in taken]
            else:
                items = list(itertools.islice(self._from(chunk, path, start, line, first), count))
                if self._open is not None:
                    self._open = (chunk, first + count, self._open[2])
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}; {HINT}") from error
        if len(items) < count:
            raise DataError(f"{path}: has fewer rows than when the run began; leave data alone while it is read")
        return items

    def _from(self, chunk: int, path: str, start: int, line: int, first: int) -> Iterator[Item]:
        known = self._open
        if known is None or known[0] != chunk or known[1] > first:
            known = (chunk, 0, _items_of_chunk(path, start, line))
        self._open = known
        for _ in itertools.islice(known[2], first - known[1]):
            pass
        return known[2]


def _of_table(table: Any, name: str, first: int, count: int) -> list[Item]:
    columns = table[first : first + count]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [RawRow(row, name, first + i + 1) for i, row in enumerate(rows)]


def _items_of_chunk(path: str, start: int, line: int) -> Iterator[Item]:
    if suffix_of(path) == ".parquet":
        with open_parquet(path) as file:
            for batch in file.iter_batches(LINES_OF_A_CHUNK, row_groups=[start]):
                for data in batch.to_pylist():
                    line += 1
                    yield RawRow(data, path, line)
    elif suffix_of(path) == ".arrow":
        for batch in open_arrow(path).slice(line).to_batches(max_chunksize=LINES_OF_A_CHUNK):
            for data in batch.to_pylist():
                line += 1
                yield RawRow(data, path, line)
    else:
        yield from each_item(path)
