"""Data sets by name: what ``--custom_dataset_info FILE`` describes and what ``--external_plugins FILE.py`` registers.

A plugin is a Python file that is run once in every process::

    from mswift.data import register_dataset

    def preprocess(row):
        return {"query": row["q"], "response": row["a"]}     # a row, a list of rows, or None to leave it out

    register_dataset("my-data", path="data/*.csv", preprocess=preprocess)
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from mswift.data.faults import got, names
from mswift.data.messages import DEFAULT_NAMES, ROLES, MessageNames
from mswift.data.specs import SourceKind, SourceSpec, parse_spec
from mswift.errors import ConfigError, DataError, one_line

Preprocess: TypeAlias = Callable[[dict[str, Any]], dict[str, Any] | list[dict[str, Any]] | None]

_INFO_KEYS = (
    "ms_dataset_id",
    "hf_dataset_id",
    "dataset_path",
    "dataset_name",
    "subsets",
    "split",
    "columns",
    "messages",
    "tags",
    "help",
    "huge_dataset",
)
_MESSAGE_KEYS = ("role_key", "content_key", *(f"{role}_role" for role in ROLES))


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to read: a file, folder, pattern or subset of a hub, and how its rows are understood.

    Args:
        columns: its names of columns -> ours. given: its names of the parts of a message. preprocess: made of each raw row before all that.
        entry: number of the entry of ``--dataset`` that it is of.
    """

    spec: SourceSpec
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    given: MessageNames = DEFAULT_NAMES
    preprocess: Preprocess | None = None
    entry: int = 0


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """A registered data set: where it is (by kind of source), and its parts by the names of subsets; ``""`` is the only one without a name."""

    places: dict[SourceKind, str]
    parts: dict[str, Part]


_KNOWN: dict[str, DatasetInfo] = {}


def register_dataset(
    name: str,
    *,
    path: str = "",
    hf_id: str = "",
    ms_id: str = "",
    subsets: Sequence[str] = (),
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    messages: MessageNames = DEFAULT_NAMES,
    preprocess: Preprocess | None = None,
) -> None:
    """Makes ``--dataset NAME`` known; a path or a hub id that is given there is understood in the same way.

    Args:
        path, hf_id, ms_id: where it is; a hub's is taken by ``--use_hf``, and a path before both. With none of them `name` is the path.
        subsets: the ones to read, all of them without ``NAME:subset``.
        preprocess: makes a row, several or none of a raw one.
    """
    places: dict[SourceKind, str] = {"local": path} if path else {}
    places |= {"hf": hf_id} if hf_id else {}
    places |= {"ms": ms_id} if ms_id else {}
    part = Part(SourceSpec("", "local"), split, dict(columns or {}), messages, preprocess)
    add_info([name], DatasetInfo(places or {"local": name}, dict.fromkeys(subsets, part) or {"": part}))


def add_info(known_as: Sequence[str], info: DatasetInfo) -> None:
    for name in {*known_as, *info.places.values()}:
        _KNOWN[name] = info


def forget_all() -> None:
    """As in a new process."""
    _KNOWN.clear()


def load_plugins(paths: Sequence[str]) -> None:
    """Runs each file, or the ``__init__.py`` of a folder.

    Raises:
        ConfigError: there is none, or it fails.
    """
    for text in paths:
        path = Path(text).expanduser()
        path = path / "__init__.py" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"--external_plugins {text}: there is no such Python file; check the path")
        try:
            runpy.run_path(str(path))
        except Exception as error:  # whatever a user's file raises
            raise ConfigError(f"--external_plugins {text}: {type(error).__name__}: {one_line(error)}; mend the file") from error


def load_infos(paths: Sequence[str]) -> None:
    """Reads files of ``--custom_dataset_info``.

    Raises:
        ConfigError: one is missing, no JSON, or an entry is wrong.
    """
    for text in paths:
        path = Path(text).expanduser()
        try:
            entries = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else one_line(error)
            raise ConfigError(f"--custom_dataset_info {text}: cannot be read: {reason}; wanted a JSON list of data sets") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(f'--custom_dataset_info {text}: got {got(entries)}, wanted a list such as [{{"dataset_path": "a.jsonl"}}]')
        for number, entry in enumerate(entries):
            _add_entry(f"--custom_dataset_info {text}: entry {number + 1}", entry, path.parent)


def parts_of(spec: SourceSpec, *, use_hf: bool | None = None) -> list[Part]:
    """What is read for an entry of ``--dataset``: itself, or what is registered under its name.

    Raises:
        DataError: a subset that a registered data set does not have.
    """
    info = _KNOWN.get(spec.location) or _KNOWN.get(spec.name)
    if info is None:
        return [Part(spec)]
    preferred: list[SourceKind] = ["local", spec.kind, "hf" if use_hf else "ms", *info.places]
    kind = next(kind for kind in preferred if kind in info.places)
    place = info.places[kind]
    wanted = list(info.parts) if spec.subsets in ((), ("all",)) else list(spec.subsets)
    unknown = [name for name in wanted if name not in info.parts and list(info.parts) != [""]]
    if unknown:
        raise DataError(f"{spec.name}: there is no subset {unknown[0]}, wanted one of {', '.join(info.parts)}")
    made = []
    for name in wanted:
        part = info.parts.get(name) or info.parts[""]
        subsets = part.spec.subsets or ((name,) if name and kind != "local" else ())
        made.append(replace(part, spec=SourceSpec(str(Path(place).expanduser()) if kind == "local" else place, kind, None, subsets)))
    return made


def resolve(text: str, *, use_hf: bool | None = None) -> tuple[SourceSpec, list[Part]]:
    """An entry of ``--dataset`` and what is read for it. Raises `DataError` as `parse_spec` and `parts_of`."""
    spec = parse_spec(text, use_hf=use_hf)
    bare = spec.location.rpartition(":")
    if spec.kind == "local" and spec.location not in _KNOWN and bare[0] in _KNOWN:
        spec = replace(spec, location=bare[0], subsets=tuple(bare[2].split("/")))
    return spec, parts_of(spec, use_hf=use_hf)


def _add_entry(where: str, entry: dict[str, Any], folder: Path) -> None:
    unknown = [key for key in entry if key not in _INFO_KEYS]
    if unknown:
        raise ConfigError(f"{where} has the key {unknown[0]}, wanted some of {', '.join(_INFO_KEYS)}")
    places: dict[SourceKind, str] = {}
    kinds: dict[SourceKind, str] = {"local": "dataset_path", "hf": "hf_dataset_id", "ms": "ms_dataset_id"}
    for kind, key in kinds.items():
        value = entry.get(key)
        if value:
            beside = folder / str(value)
            places[kind] = str(beside) if kind == "local" and not Path(value).exists() and beside.exists() else str(value)
    if not places:
        raise ConfigError(f"{where} has the keys {names(entry)}, wanted dataset_path, hf_dataset_id or ms_dataset_id")
    subsets = entry.get("subsets") or [""]
    parts = {}
    for subset in subsets:
        own = {**entry, **(subset if isinstance(subset, dict) else {"subset": subset})}
        name = str(own.get("name") or own["subset"]) if isinstance(subset, dict) else str(subset)
        parts[name] = _part(where, own)
    add_info([str(entry["dataset_name"])] if entry.get("dataset_name") else [], DatasetInfo(places, parts))


def _part(where: str, entry: dict[str, Any]) -> Part:
    columns, messages = entry.get("columns") or {}, entry.get("messages") or {}
    for key, value in (("columns", columns), ("messages", messages)):
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise ConfigError(f"{where}: {key} is {got(value)}, wanted an object of names")
    unknown = [key for key in messages if key not in _MESSAGE_KEYS]
    if unknown:
        raise ConfigError(f"{where}: messages has the key {unknown[0]}, wanted some of {', '.join(_MESSAGE_KEYS)}")
    split = entry.get("split")
    first = split[0] if isinstance(split, list) and split else split
    given = MessageNames(
        (messages["role_key"],) if "role_key" in messages else DEFAULT_NAMES.role_keys,
        (messages["content_key"],) if "content_key" in messages else DEFAULT_NAMES.content_keys,
        {messages[f"{role}_role"]: role for role in ROLES if f"{role}_role" in messages},
    )
    subset = str(entry.get("subset") or "")
    return Part(
        SourceSpec("", "local", None, (subset,) if subset else ()),
        None if first is None else str(first),
        columns,
        given,
    )
