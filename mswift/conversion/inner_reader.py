"""A text part inside a larger checkpoint, read as if it stood alone; see `file_forms`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from mswift.conversion.directories import listing
from mswift.conversion.file_forms import PREFIXES, TOWER, inner_name
from mswift.conversion.in_turn import Advice
from mswift.conversion.rules import Shape
from mswift.conversion.safetensors_io import TensorReader, TensorSpec
from mswift.errors import ModelError


class InnerReader(TensorReader):
    """A checkpoint whose text part has a prefix, without it.

    Args:
        stored: closed with the reader.

    Raises:
        ModelError: two tensors would have one name.
    """

    def __init__(self, stored: TensorReader) -> None:
        self.directory, self._stored = stored.directory, stored
        self._where = {inner_name(name): name for name in stored.names}
        counts = Counter(map(inner_name, stored.names))
        if len(counts) < len(stored.names):
            twice = [name for name, count in counts.items() if count > 1]
            raise ModelError(
                f"{stored.directory}: {listing('tensor', twice)} both with and without the prefix of a text part; download the model again"
            )
        prefixes = [(ours, theirs) for theirs, ours in PREFIXES if any(name.startswith(theirs) for name in stored.names)]
        self._prefix = prefixes[0]

    @staticmethod
    def fits(names: Iterable[str]) -> bool:
        """Whether any of these tensors is one of a text part."""
        return any(inner_name(name) != name for name in names)

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def stored_name(self, name: str) -> str:
        ours, theirs = self._prefix
        return self._where.get(name) or (theirs + name.removeprefix(ours) if name.startswith(ours) and not TOWER.matches(name) else name)

    def spec(self, name: str) -> TensorSpec:
        return self._stored.spec(self._where[name])

    def read_into(self, name: str, out: torch.Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        self._stored.read_into(self._where[name], out, rows, columns)

    def read_as(self, name: str, shape: Shape, rows: slice, columns: slice | None = None) -> torch.Tensor:
        return self._stored.read_as(self._where[name], shape, rows, columns)

    def advise(self, name: str, rows: slice | None, advice: Advice) -> None:
        self._stored.advise(self._where[name], rows, advice)

    def close(self) -> None:
        self._stored.close()
