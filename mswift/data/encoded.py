"""Training rows as token ids and weights, in memory or memory-mapped from a cached data set, behind one interface."""

from __future__ import annotations

import functools
import hashlib
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.data.report import LengthReport
from mswift.data.rows import Row
from mswift.templates import Encoded

Ids: TypeAlias = npt.NDArray[np.int32]
Weights: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.int64]

_FORGET_BYTES = 2**28  # of mapped files that may become resident: they are given back, so that a pass over them does not fill the memory
_LOOK_EVERY = 32  # rows: Linux may map 2 MiB around the place of a row, of each of the two files
_FIRST_BYTES = 2**20


class TokenTaker(Protocol):
    """Takes encoded rows one chunk after the other."""

    def add(self, ids: Ids, weights: Weights, lengths: Integers, origins: Sequence[Row]) -> None:
        """Rows end to end, and for each its length and the row of a source that it was made from."""


class TokenSink(TokenTaker, Protocol):
    """A taker that gives the data set that the rows make."""

    def finish(self, report: LengthReport) -> TokenRows: ...


@dataclass(frozen=True, slots=True)
class TokenArrays:
    """Rows end to end, and where each came from; in memory or mapped.

    Attributes:
        ids, weights: int32 and float32 ``[tokens]``. sources: names. places: int64 ``[rows, 2]``: number of the source, line.
        content: fingerprint of the rows; empty where it is not known yet.
    """

    ids: Ids
    weights: Weights
    sources: Sequence[str]
    places: Integers
    content: str = ""


class TokenRows:
    """Rows of one or several `TokenArrays`, in any choice and order.

    Attributes:
        lengths: int64 ``[len]``, tokens of each row.
        report: what was kept, cut and dropped when they were made.
    """

    def __init__(
        self, parts: Sequence[TokenArrays], part_of: npt.NDArray[np.int32], starts: Integers, lengths: Integers, report: LengthReport
    ) -> None:
        """Row i is tokens ``[starts[i], starts[i] + lengths[i])`` of part ``part_of[i]``, and the row ``rows[i]`` of its places."""
        self.parts, self.lengths, self.report = list(parts), lengths, report
        self._part_of, self._starts = part_of, starts
        self._rows = np.concatenate([np.arange(len(part.places)) for part in parts]) if parts else np.zeros(0, np.int64)
        self._mapped = [found for part in parts for array in (part.ids, part.weights) if (found := _mapping(array)) is not None]
        self._num_read, self._floor = 0, 2**62
        self._chosen = False

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        ids, weights = self.arrays(index)
        return Encoded(ids.tolist(), weights.tolist())

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    def arrays(self, index: int) -> tuple[Ids, Weights]:
        """Ids and weights of row ``index``, without a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part, start, length = self.parts[self._part_of[index]], self._starts[index], self.lengths[index]
        if self._mapped and self._num_read % _LOOK_EVERY == 0:
            self._look()
        self._num_read += 1
        return part.ids[start : start + length], part.weights[start : start + length]

    def where(self, index: int) -> str:
        """File and line that row ``index`` was made from."""
        part = self.parts[self._part_of[index]]
        source, line = part.places[self._rows[index]]
        return f"{part.sources[source]}:{line}"

    def choose(self, rows: Sequence[int] | Integers) -> TokenRows:
        """These rows of it in this order; one may come more than once."""
        index = np.asarray(rows, np.int64)
        chosen = TokenRows(self.parts, self._part_of[index], self._starts[index], self.lengths[index], self.report)
        chosen._rows, chosen._chosen = self._rows[index], True
        return chosen

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @functools.cached_property
    def _fingerprint(self) -> str:
        parts = [part.content or content_of(part.ids, part.weights, _offsets(self.lengths)) for part in self.parts]
        if len(parts) == 1 and not self._chosen:
            return parts[0]
        digest = hashlib.sha256("".join(parts).encode())
        for table in (self._part_of, self._starts, self.lengths):
            digest.update(np.ascontiguousarray(table).data)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over tokens, weights and row limits: equal for equal training rows in equal order, in memory and mapped."""
        return self._fingerprint

    def _look(self) -> None:
        """Gives the pages of mapped files back where too many of them have become resident since the last time."""
        resident = _resident_files()
        self._floor = min(self._floor, resident)
        if resident > self._floor + _FORGET_BYTES:
            for mapping in self._mapped:
                mapping.madvise(mmap.MADV_DONTNEED)
            self._floor = _resident_files()


def _mapping(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """The mapped file of an array, where its pages can be given back."""
    base = array.base if isinstance(array, np.memmap) and sys.platform == "linux" else None
    return base if isinstance(base, mmap.mmap) else None


def _resident_files() -> int:
    """Bytes of this process's memory that are mapped files."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[2]) * mmap.PAGESIZE


def join(data: Sequence[TokenRows], report: LengthReport) -> TokenRows:
    """All rows of several data sets, one after the other."""
    if len(data) == 1:
        return data[0]
    firsts = np.cumsum([0] + [len(one.parts) for one in data])
    part_of = np.concatenate([one._part_of + np.int32(first) for one, first in zip(data, firsts)])
    joined = TokenRows(
        [part for one in data for part in one.parts],
        part_of,
        np.concatenate([one._starts for one in data]),
        np.concatenate([one.lengths for one in data]),
        report,
    )
    joined._rows, joined._chosen = np.concatenate([one._rows for one in data]), True
    return joined


def rows_of_arrays(arrays: TokenArrays, lengths: Integers, report: LengthReport) -> TokenRows:
    """All rows of one part in their order."""
    return TokenRows([arrays], np.zeros(len(lengths), np.int32), _offsets(lengths)[:-1], lengths, report)


def _offsets(lengths: Integers) -> Integers:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def content_of(ids: Ids, weights: Weights, offsets: Integers) -> str:
    """The fingerprint of rows end to end: over the digests of ids, weights and offsets, each of which can be made piece by piece."""
    return content_of_digests(*(hashlib.sha256(np.ascontiguousarray(array).data).digest() for array in (ids, weights, offsets)))


def content_of_digests(ids: bytes, weights: bytes, offsets: bytes) -> str:
    return hashlib.sha256(ids + weights + offsets).hexdigest()


class Places:
    """Collects where rows came from."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, origins: Sequence[Row]) -> Integers:
        """int64 ``[rows, 2]``: number of the source, line."""
        numbers = self.numbers
        flat = [number for row in origins for number in (numbers.setdefault(row.source, len(numbers)), row.line)]
        return np.asarray(flat, np.int64).reshape(-1, 2)


class EncodedDataset(TokenRows):
    """Rows in memory: int32 ids and float32 weights end to end."""

    def __init__(self, encoded: Sequence[tuple[Ids, Weights]], rows: Sequence[Row], report: LengthReport) -> None:
        """``rows[i]`` is the row that ``encoded[i]`` was made from."""
        places = Places()
        where = places.of(rows)
        lengths = np.asarray([len(ids) for ids, _ in encoded], np.int64)
        ids = np.concatenate([ids for ids, _ in encoded]) if encoded else np.empty(0, np.int32)
        weights = np.concatenate([weights for _, weights in encoded]) if encoded else np.empty(0, np.float32)
        part = TokenArrays(ids, weights, list(places.numbers), where)
        super().__init__([part], np.zeros(len(lengths), np.int32), _offsets(lengths)[:-1], lengths, report)


class _Column:
    """An array that grows without being copied: Linux moves its pages, and none is touched before it is needed."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype, self._size = np.dtype(dtype), 0
        self._memory = _anonymous(_FIRST_BYTES)

    def add(self, array: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(array, self._dtype).data.cast("B")
        end = self._size + len(data)
        if end > len(self._memory):
            self._grow(max(end, len(self._memory) * 5 // 4))
        self._memory[self._size : end] = data
        self._size = end

    def array(self) -> npt.NDArray[Any]:
        return np.frombuffer(self._memory, self._dtype, self._size // self._dtype.itemsize)

    def _grow(self, size: int) -> None:
        if sys.platform == "linux":
            self._memory.resize(size)
            return
        larger = _anonymous(size)
        larger[: self._size] = self._memory[: self._size]
        self._memory = larger


def _anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class MemorySink:
    """Keeps the rows in memory."""

    def __init__(self) -> None:
        self._ids, self._weights = _Column(np.int32), _Column(np.float32)
        self._lengths, self._where = _Column(np.int64), _Column(np.int64)
        self._places = Places()

    def add(self, ids: Ids, weights: Weights, lengths: Integers, origins: Sequence[Row]) -> None:
        for column, array in ((self._ids, ids), (self._weights, weights), (self._lengths, lengths), (self._where, self._places.of(origins).ravel())):
            column.add(array)

    def finish(self, report: LengthReport) -> TokenRows:
        where = self._where.array().reshape(-1, 2)
        arrays = TokenArrays(self._ids.array(), self._weights.array(), list(self._places.numbers), where)
        return rows_of_arrays(arrays, self._lengths.array(), report)
