"""Weights in pickles (``pytorch_model.bin``, ``adapter_model.bin``), unpickled by torch's ``weights_only``, which makes tensors and runs no code.

A file is mapped for as long as it takes to see where in it each tensor lies; then it is read as a safetensors file is, only the bytes that are
asked for. A file where that cannot be seen is held while it is read: one of torch before 1.6, or with tensors whose bytes do not lie in order.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from mswift.conversion.directories import PICKLE_INDEX_FILE, Header, HeaderEntry, damaged, listing, located, read_archive, weight_files
from mswift.conversion.in_turn import Advice
from mswift.conversion.rules import Shape
from mswift.conversion.safetensors_io import TYPE_NAMES, CheckpointReader, SafetensorsFile, TensorFile, TensorSpec
from mswift.errors import ModelError
from mswift.log import get_logger

Tensors = dict[str, torch.Tensor]
_WANTED = re.compile(r"GLOBAL ([\w.]+)")
"""In torch's message: what a pickle asks for and does not get."""

log = get_logger(__name__)


class PickleReader(CheckpointReader):
    """The pickles of an HF model directory, as they are stored. Opening unpickles names, types and shapes; no weights are read.

    Args:
        directory: with ``config.json`` and either ``pytorch_model.bin`` or ``pytorch_model.bin.index.json`` and its files.

    Raises:
        ModelError: anything of that is missing, truncated, corrupt or at odds with the index; or a pickle holds other things than tensors.
    """

    def _open(self) -> dict[str, str]:
        filenames, weight_map = weight_files(self.directory)
        self._held: dict[Path, Tensors] = {}
        for filename in filenames:
            self._files[filename] = open_pickle(self.directory / filename, self._held)
        notice(self.directory)
        return located(self.directory / PICKLE_INDEX_FILE, weight_map, {filename: file.specs for filename, file in self._files.items()})


def notice(directory: Path) -> None:
    """Say once for a directory how its pickles are read."""
    log.info("%s: its weights are pickles; they are read as tensors only (weights_only), and no code in them runs", directory)


def open_pickle(path: Path, held: dict[Path, Tensors]) -> TensorFile:
    """One pickle of named tensors.

    Args:
        held: of all files that are read together: the tensors of the last one that had to be read whole.

    Raises:
        ModelError: the file is absent, truncated or corrupt, or holds, or asks for, other things than tensors.
    """
    records = read_archive(path)
    tensors = _unpickle(path)
    entries = None if records is None else _entries(path, tensors, records)
    if entries is not None:
        return SafetensorsFile(path, Header(entries, {}))
    return HeldFile(path, {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, held)


class HeldFile:
    """A pickle of which all tensors are held while it is read; another file of the same reader takes its place."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], held: dict[Path, Tensors]) -> None:
        self.path, self.specs, self._held = path, specs, held

    def read_into(self, name: str, out: torch.Tensor, rows: slice | None = None, columns: slice | None = None, *, shape: Shape | None = None) -> None:
        """As `SafetensorsFile.read_into`."""
        if self.path not in self._held:
            self._held.clear()
            self._held[self.path] = _unpickle(self.path)
        tensor = self._held[self.path][name]
        tensor = tensor if shape is None else tensor.reshape(shape)
        assert out.dtype == tensor.dtype, f"{name} is {tensor.dtype}, its destination {out.dtype}"
        tensor = tensor if rows is None or tensor.dim() == 0 else tensor[rows]
        tensor = tensor if columns is None else tensor[:, columns]
        assert out.numel() == tensor.numel(), f"{name}: the slice has {tensor.numel()} elements, its destination {out.numel()}"
        out.view(tensor.shape).copy_(tensor)

    def advise(self, name: str, rows: slice | None, advice: Advice) -> None:
        """There is nothing to tell the system."""

    def close(self) -> None:
        self._held.clear()


def _unpickle(path: Path) -> Tensors:
    """All tensors of a file, mapped where it is an archive.

    Raises:
        ModelError: it is damaged, asks for what is no tensor, or holds it.
    """
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = _WANTED.search(str(error))
        if wanted is None:
            raise damaged(path, "it is no pickle of tensors") from None
        raise ModelError(
            f"{path} is a pickle that asks for {wanted[1]}, which is refused: only tensors are read (weights_only); take it as safetensors"
        ) from None
    except Exception as error:  # what a damaged pickle raises depends on its bytes
        raise damaged(path, " ".join(str(error).split())[:100] or type(error).__name__) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, wanted tensors by name (a state_dict); save it again as one")
    others = [str(name) for name, value in content.items() if not isinstance(name, str) or not _is_plain(value)]
    if others:
        raise ModelError(
            f"{path} holds {listing('other thing', others)} than plain tensors by name (a state_dict); save the tensors alone, as safetensors"
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def _is_plain(value: object) -> bool:
    """Whether this is a tensor of numbers that safetensors could hold as well."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in TYPE_NAMES
        and not (value.is_conj() or value.is_neg())
    )


def _entries(path: Path, tensors: Mapping[str, torch.Tensor], records: Mapping[int, int]) -> dict[str, HeaderEntry] | None:
    """Where in an archive the bytes of each tensor are, several for the same where they share them; None where they do not lie in order.

    Raises:
        ModelError: a tensor wants more bytes than the archive has for it.
    """
    mappings = _mappings()
    entries = {}
    for name, tensor in tensors.items():
        storage, offset = tensor.untyped_storage(), 0
        if tensor.numel():
            begin = next((at + storage.data_ptr() - start for start, stop, at in mappings if start <= storage.data_ptr() < stop), -1)
            if begin not in records or not tensor.is_contiguous():
                return None
            if storage.nbytes() > records[begin]:
                raise damaged(path, f"{name} has {storage.nbytes()} bytes, of which {records[begin]} are there")
            offset = begin + tensor.data_ptr() - storage.data_ptr()
        entries[name] = HeaderEntry(TYPE_NAMES[tensor.dtype], tuple(tensor.shape), offset)
    return entries


def _mappings() -> list[tuple[int, int, int]]:
    """First and past-the-last address, and offset in its file, of everything that this process has mapped; nothing where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for addresses, _, offset, *rest in (line.split(maxsplit=5) for line in lines):
        start, stop = addresses.split("-")
        if rest[-1].startswith("/"):
            found.append((int(start, 16), int(stop, 16), int(offset, 16)))
    return found
