"""Where rows come from: files of many kinds, folders and patterns of them, Hugging Face and ModelScope data sets.

Every row keeps its file and line, so that whatever is wrong with it later can be said with its place. A local path never contacts anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from mswift.data.files import OnBad, RawRow, read_file, stop
from mswift.data.hubs import read_hub
from mswift.data.registry import resolve
from mswift.data.specs import SourceKind, SourceSpec, check_suffix, local_files, parse_spec
from mswift.errors import DataError

__all__ = ["RawRow", "SourceKind", "SourceSpec", "check_sources", "parse_spec", "read_file", "read_source"]


def check_sources(specs: Sequence[str], *, use_hf: bool | None = None) -> None:
    """Look whether the files of all local sources are there and of a kind that `read_file` reads; hubs are not asked.

    Raises:
        DataError: with the first one that is not.
    """
    for part in [part for text in specs for part in resolve(text, use_hf=use_hf)[1]]:
        for path in local_files(part.spec.location) if part.spec.kind == "local" else ():
            check_suffix(path)
            if not os.access(path, os.R_OK):
                raise DataError(f"{path}: cannot be read: you have no permission; give yourself read access (chmod u+r)")


def source_files(specs: Sequence[str], *, use_hf: bool | None = None) -> list[str]:
    """The files of all local sources, each once; hubs have none."""
    parts = [part for text in specs for part in resolve(text, use_hf=use_hf)[1] if part.spec.kind == "local"]
    return list(dict.fromkeys(path for part in parts for path in local_files(part.spec.location)))


def read_source(spec: SourceSpec, split: str | None = None, on_bad: OnBad = stop) -> Iterator[RawRow]:
    """The rows of a source in order, ``#N`` not applied. Raises `DataError` with file and line for what cannot be read.

    Args:
        split: of a hub's data set; its training rows without. on_bad: as for `read_file`.
    """
    if spec.kind != "local":
        yield from read_hub(spec, split)
        return
    for path in local_files(spec.location):
        yield from read_file(path, on_bad)
