"""Data sets of Hugging Face and ModelScope, through `datasets`. Nothing here is imported or contacted for a local path."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from mswift.data.files import RawRow
from mswift.data.specs import SourceSpec
from mswift.errors import DataError, MissingExtraError, one_line


def read_hub(spec: SourceSpec, split: str | None = None) -> Iterator[RawRow]:
    """The rows of a hub's data set, subset after subset.

    Raises:
        DataError: it cannot be loaded. MissingExtraError: ModelScope's library is not there.
    """
    number = 0
    for table in open_hub(spec, split):
        for data in table:
            number += 1
            yield RawRow(dict(data), spec.name, number)


def open_hub(spec: SourceSpec, split: str | None = None) -> list[Any]:
    """The data set as ``datasets.Dataset`` in mapped memory, one for each subset. Raises as `read_hub`."""
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # they tell of every attempt to reach the hub; the last one is told below
    try:
        name = spec.location if spec.kind == "hf" else _copy_from_ms(spec.location)
        return _load(name, spec, split or "train")
    except (MissingExtraError, DataError):
        raise
    except Exception as error:  # each hub library has an error tree of its own
        raise DataError(
            f"{spec.kind}::{spec.location}: cannot be loaded from the hub: {_reason(error)}; there is no local file or directory of this name either"
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong, in short where nothing could be reached: the libraries then tell of sockets and retries."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    words = ("connection", "network", "maxretry", "nameresolution", "connecterror", "localentrynotfound", "offlinemode")
    unreachable = any(word in type(link).__name__.lower() for link in chain for word in words)
    return "it could not be reached; check the network, or put the files here and give their path" if unreachable else one_line(error)


def _load(name: str, spec: SourceSpec, split: str) -> list[Any]:
    library = importlib.import_module("datasets")
    subsets: list[str | None] = list(spec.subsets)
    if spec.subsets == ("all",):
        subsets = list(library.get_dataset_config_names(name))
    elif not subsets:
        known = library.get_dataset_config_names(name)
        if len(known) > 1 and "default" not in known:
            shown = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
            raise DataError(f"{spec.name}: has {len(known)} subsets ({shown}), wanted one or more: {spec.name}:{known[0]}, or {spec.name}:all")
    return [_undecoded(library, library.load_dataset(name, subset, split=split)) for subset in subsets or [None]]


def _undecoded(library: Any, table: Any) -> Any:
    """Images and audio as bytes and path: what they look like is nobody's business here."""
    for column, feature in table.features.items():
        if isinstance(feature, (library.Image, library.Audio)):
            table = table.cast_column(column, type(feature)(decode=False))
    return table


def _copy_from_ms(name: str) -> str:
    """Through a local copy: modelscope's own loader needs an old `datasets` and much else."""
    try:
        download: Callable[[str], str] = importlib.import_module("modelscope.hub.snapshot_download").dataset_snapshot_download
    except ImportError as error:
        raise MissingExtraError("modelscope", "modelscope") from error
    for known in [known for known in logging.root.manager.loggerDict if known.startswith("modelscope")]:
        logging.getLogger(known).setLevel(logging.CRITICAL)
    return download(name)
