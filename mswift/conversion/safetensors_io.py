"""Safetensors files, read by slice and written by stream: a rank moves only the bytes it keeps, one tensor at a time.

Reading goes through plain positioned reads into the destination, not through a memory map: a file that shrinks underneath is an error
rather than a crash, and network file systems read ahead. What a directory holds is read by `mswift.conversion.directories`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from mswift.conversion.directories import Header, damaged, listing, open_file, parse_header, read_weights
from mswift.conversion.in_turn import Advice, advise
from mswift.conversion.rules import Shape
from mswift.errors import ConversionError, ModelError

METADATA = {"format": "pt"}

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
TYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""What safetensors calls the dtypes that it can hold."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of a tensor that is in a file, or will be."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def flat(self, dims: int) -> TensorSpec:
        """The same bytes with the first dims taken as one, down to `dims` of them."""
        joined = len(self.shape) - dims + 1
        return self if joined < 2 else TensorSpec(self.dtype, (math.prod(self.shape[:joined]), *self.shape[joined:]))


_WINDOW, _WINDOWS = 64 * 2**20, 4
"""Bytes that are written before the disk begins with them (by itself the system lets gigabytes wait, and then the writers), and after how many times
that the page cache gives up what the disk has: memory that was in use a moment ago is faster than new memory."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes; the tensor lives as long as they do."""
    array = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())  # a view through NumPy would end all resizing of its storage
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


class TensorFile(Protocol):
    """One open file of named tensors; `SafetensorsFile` tells what its methods do."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read_into(
        self, name: str, out: torch.Tensor, rows: slice | None = None, columns: slice | None = None, *, shape: Shape | None = None
    ) -> None: ...

    def advise(self, name: str, rows: slice | None, advice: Advice) -> None: ...

    def close(self) -> None: ...


class SafetensorsFile:
    """One open file: its header is checked against its size at once, its bytes are read when asked for.

    Args:
        header: of this file, if it has been read already.

    Raises:
        ModelError: the file is absent, truncated or corrupt.
    """

    def __init__(self, path: Path, header: Header | None = None) -> None:
        self.path = path
        self._file = open_file(path)
        try:
            header = header or parse_header(self._file, path)
        except BaseException:
            self._file.close()
            raise
        self.metadata = header.metadata
        self.specs = {name: TensorSpec(_DTYPES[entry.type], entry.shape) for name, entry in header.tensors.items()}
        self._offsets = {name: entry.offset for name, entry in header.tensors.items()}

    def read_into(self, name: str, out: torch.Tensor, rows: slice | None = None, columns: slice | None = None, *, shape: Shape | None = None) -> None:
        """Fill ``out`` with rows ``[start, stop)`` of dim 0 and columns ``[start, stop)`` of dim 1, reading no other bytes.

        Args:
            out: contiguous, on the CPU, of the file's dtype and of the shape of the slice.
            shape: take the tensor as if it had this shape, of as many elements.

        Raises:
            ModelError: the file cannot be read, or has become shorter than its header says.
        """
        spec = self.specs[name] if shape is None else TensorSpec(self.specs[name].dtype, shape)
        first, last = _span(rows, spec.shape[0] if spec.shape else 1)
        view, begin = bytes_of(out), self._offsets[name] + first * spec.row_bytes
        if columns is None or _span(columns, spec.shape[1]) == (0, spec.shape[1]):
            runs, run, step, skip = 1, (last - first) * spec.row_bytes, 0, 0
        else:
            low, high = _span(columns, spec.shape[1])
            column = math.prod(spec.shape[2:]) * spec.dtype.itemsize
            runs, run, step, skip = last - first, (high - low) * column, spec.row_bytes, low * column
        assert out.dtype == spec.dtype, f"{name} is {spec.dtype}, its destination {out.dtype}"
        assert view.nbytes == runs * run, f"{name}: the slice has {runs * run} bytes, its destination {view.nbytes}"
        for index in range(runs):
            self._read_exactly(view[index * run : (index + 1) * run], begin + index * step + skip)

    def advise(self, name: str, rows: slice | None, advice: Advice) -> None:
        """Tell the system what becomes of rows."""
        spec = self.specs[name]
        first, last = _span(rows, spec.shape[0] if spec.shape else 1)
        advise(self._file.fileno(), self._offsets[name] + first * spec.row_bytes, (last - first) * spec.row_bytes, advice)

    def _read_exactly(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = os.preadv(self._file.fileno(), [view], offset)
            except OSError as error:
                raise ModelError(f"cannot read {self.path}: {error.strerror}; check the disk, or copy the file again") from None
            if count == 0:
                raise damaged(self.path, "it became shorter while it was read")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        self._file.close()


def _span(part: slice | None, size: int) -> tuple[int, int]:
    start, stop, _ = (part or slice(None)).indices(size)
    return start, max(start, stop)


def sliced_shape(shape: Shape, rows: slice | None, columns: slice | None) -> Shape:
    """The shape that is left of ``shape`` after slicing dim 0 and dim 1 (step 1)."""
    spans = [_span(part, size) for part, size in zip((rows, columns), shape)]
    return tuple(stop - start for start, stop in spans) + shape[2:]


class TensorReader(ABC):
    """A model directory as one set of named plain tensors, however they are stored. A context manager that closes its files."""

    directory: Path

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """All tensors, in file order."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec: ...

    @abstractmethod
    def read_into(self, name: str, out: torch.Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        """Fill ``out`` (contiguous, on the CPU, of the tensor's dtype) with rows ``[start, stop)`` of dim 0 and columns ``[start, stop)`` of dim 1.

        Raises:
            ModelError: the file cannot be read, or what it holds is no number.
        """

    @abstractmethod
    def advise(self, name: str, rows: slice | None, advice: Advice) -> None:
        """Tell the system what becomes of rows, for its page cache."""

    @abstractmethod
    def close(self) -> None: ...

    def stored_name(self, name: str) -> str:
        """What the checkpoint itself calls a tensor, or would call it."""
        return name

    def shape(self, name: str) -> Shape:
        return self.spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.spec(name).dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.spec(name).nbytes for name in self.names)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        """A new tensor of the tensor's own dtype: what `read_into` fills."""
        spec = self.spec(name)
        out = torch.empty(sliced_shape(spec.shape, rows, columns), dtype=spec.dtype)
        self.read_into(name, out, rows, columns)
        return out

    def read_as(self, name: str, shape: Shape, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """Rows of a tensor taken as if its first two dims were one, as ``shape`` has it; all of one entry of the first."""
        height = self.shape(name)[1]
        index = rows.start // height
        lines = slice(rows.start - index * height, rows.stop - index * height)
        found = self.read(name, slice(index, index + 1), lines)[0]
        return found if columns is None else found[:, columns]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class CheckpointReader(TensorReader):
    """The safetensors of an HF model directory, as they are stored. Opening reads the headers only.

    Args:
        directory: with ``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json`` and its files.

    Raises:
        ModelError: anything of that is missing, truncated, corrupt or at odds with the index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, TensorFile] = {}
        try:
            where = self._open()
        except BaseException:
            self.close()
            raise
        self._where = {name: self._files[filename] for name, filename in where.items()}

    def _open(self) -> dict[str, str]:
        """Open all files; the name of the one that holds each tensor."""
        weights = read_weights(self.directory)
        for filename, header in weights.headers.items():
            self._files[filename] = SafetensorsFile(self.directory / filename, header)
        return weights.where

    def __contains__(self, name: object) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        """All tensors, in file order."""
        return list(self._where)

    def spec(self, name: str) -> TensorSpec:
        return self._where[name].specs[name]

    def read_into(self, name: str, out: torch.Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        """`SafetensorsFile.read_into` of whichever file holds the tensor."""
        self._where[name].read_into(name, out, rows, columns)

    def advise(self, name: str, rows: slice | None, advice: Advice) -> None:
        self._where[name].advise(name, rows, advice)

    def read_as(self, name: str, shape: Shape, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:  # of any shape
        """`read` of a tensor taken as if it had another shape, of as many elements."""
        out = torch.empty(sliced_shape(shape, rows, columns), dtype=self.dtype(name))
        self._where[name].read_into(name, out, rows, columns, shape=shape)
        return out

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class ShardWriter:
    """One safetensors file whose header is known beforehand; rows arrive in any order and go straight to their place.

    A context manager: leaving it with an error removes the file; leaving it well checks that every byte was written.

    Args:
        path: is created or replaced. specs: all tensors of the file; larger element types come first, so that all are aligned.
        join: the file is another process's, made with the same specs; rows are written into it, and that process checks that all are there.

    Raises:
        ConversionError: the disk is full or the file cannot be written; a tensor that does not fit its spec; rows left unwritten.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None, *, join: bool = False) -> None:
        self.path, self.joined = path, join
        self._low, self._high, self._behind = 2**62, 0, 0  # what the disk has not been told of
        self._begun: list[tuple[int, int]] = []  # what it has begun with
        order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)  # stable: names of one type keep their order
        self._specs = {name: specs[name] for name in order}
        header, self._offsets, size = _layout(self._specs, METADATA if metadata is None else metadata)
        self.written = dict.fromkeys(self._specs, 0)
        try:
            self._fd = os.open(path, os.O_RDWR | (0 if join else os.O_CREAT | os.O_TRUNC), 0o666)
        except OSError as error:
            raise ConversionError(f"cannot write {path}: {error.strerror}; free some space or choose another directory") from None
        if join:
            return
        try:
            os.ftruncate(self._fd, size)
            self._write_all(memoryview(header), 0)
        except OSError as error:
            self.discard()
            raise self._failed(error) from None

    def write(self, name: str, tensor: torch.Tensor, start_row: int = 0, columns: tuple[int, int] | None = None) -> int:
        """Put ``tensor`` at row ``start_row`` of ``name``; any device, the dtype of the spec, dims as in `TensorSpec.flat`. Returns the bytes.

        Args:
            columns: ``[start, stop)`` of dim 1, which the tensor has of each row; None: all of them.
        """
        spec = self._specs[name].flat(tensor.dim())
        rows, low, high = tuple(tensor.shape[:1]), *(columns or (0, sum(spec.shape[1:2])))
        fits = tensor.shape[1:2] == (high - low,) * len(spec.shape[1:2]) and high <= sum(spec.shape[1:2]) and tensor.shape[2:] == spec.shape[2:]
        if tensor.dtype != spec.dtype or not fits or start_row + sum(rows) > sum(spec.shape[:1]):
            got = f"{tensor.dtype} {tuple(tensor.shape)} at row {start_row}"
            raise ConversionError(f"{self.path}: {name} wants {spec.dtype} {spec.shape}, got {got}; the model and its rules disagree")
        view = bytes_of(tensor.detach().cpu().contiguous())
        runs = 1 if tensor.shape[1:] == spec.shape[1:] else len(tensor)
        begin = self._offsets[name] + start_row * spec.row_bytes + low * (spec.row_bytes // max(1, sum(spec.shape[1:2])))
        length = view.nbytes // max(1, runs)
        try:
            for index in range(runs):
                self._write_all(view[index * length : (index + 1) * length], begin + index * spec.row_bytes)
        except OSError as error:
            raise self._failed(error) from None
        self.written[name] += view.nbytes
        self._low, self._high = min(self._low, begin), max(self._high, begin + len(tensor) * spec.row_bytes if spec.shape else begin)
        self._behind += view.nbytes
        if self._behind >= _WINDOW:
            self._begun.append((self._low, self._high - self._low))
            for offset, length in self._begun[-1], *self._begun[:-_WINDOWS]:
                advise(self._fd, offset, length, "done")
            self._begun = self._begun[-_WINDOWS:]
            self._low, self._high, self._behind = 2**62, 0, 0
        return view.nbytes

    def _write_all(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    def _failed(self, error: OSError) -> ConversionError:
        return ConversionError(f"cannot write {self.path}: {error.strerror}; free some space or choose another directory")

    def close(self, others: Iterable[Mapping[str, int]] = ()) -> None:
        """Close the file, complete.

        Args:
            others: `written` of the writers that joined this one.

        Raises:
            ConversionError: some rows were never written, or were written twice.
        """
        total = {name: count + sum(other.get(name, 0) for other in others) for name, count in self.written.items()}
        wrong = [name for name, count in total.items() if count != self._specs[name].nbytes]
        if wrong and not self.joined:
            self.discard()
            raise ConversionError(f"{self.path}: {listing('incomplete tensor', wrong)}; the model and its rules disagree")
        try:
            os.close(self._fd)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise self._failed(error) from None

    def discard(self) -> None:
        """Close and remove the file; leave it to its maker where it was joined."""
        os.close(self._fd)
        if not self.joined:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def _layout(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of the file, where each tensor begins, and the size of the whole."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, spec in specs.items():
        if spec.dtype not in TYPE_NAMES:
            raise ConversionError(f"{name} has dtype {spec.dtype}, which safetensors cannot hold; convert it first")
        header[name] = {"dtype": TYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        offsets[name], end = end, end + spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}, start + end


def save_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write whole tensors as one file."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
