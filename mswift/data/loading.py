"""Sources to normalised rows, one after the other: what was recognised is said, what cannot be used is counted and named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mswift.data.faults import got
from mswift.data.files import RawRow
from mswift.data.registry import Part, resolve
from mswift.data.rows import BadRows, Recognised, Row, Want, normalise
from mswift.data.sources import read_source
from mswift.data.specs import SourceSpec
from mswift.errors import DataError, one_line
from mswift.log import get_logger

logger = get_logger("mswift.data.loading")


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How rows are read.

    Args:
        columns: names of columns in the sources -> names of `normalise`. want: what the rows are for.
        auto: whether other usual names of columns are understood. strict, max_bad_share: as `BadRows`. use_hf: as `parse_spec`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    want: Want = "answer"
    auto: bool = True
    strict: bool = False
    max_bad_share: float = 0.01
    use_hf: bool | None = None

    def bad_rows(self) -> BadRows:
        return BadRows(strict=self.strict, max_share=self.max_bad_share)


@dataclass(frozen=True, slots=True)
class LoadedSource:
    """An entry of ``--dataset`` and its rows, every one once. num_read: rows that were looked at. line: what was recognised, for the user."""

    spec: SourceSpec
    rows: list[Row]
    num_read: int
    line: str


def load_sources(texts: Sequence[str], settings: ReadSettings) -> list[LoadedSource]:
    """Reads all sources. Counts (``#N``) and weights are not applied.

    Raises:
        DataError: no source, one without rows or without usable rows, one that cannot be read, too many bad rows.
    """
    if not texts:
        raise DataError("no data: wanted at least one --dataset, such as --dataset data/train.jsonl")
    bad = settings.bad_rows()
    loaded = []
    lacking: dict[str, list[str]] = {name: [] for name in settings.columns}
    for entry, text in enumerate(texts):
        spec, parts = resolve(text, use_hf=settings.use_hf)
        recognised = Recognised()
        before = len(bad.errors)
        rows = [row for part in parts for row in read_part(replace(part, entry=entry), settings, bad, recognised)]
        total = recognised.num_read
        if not total:
            raise DataError(f"{spec}: holds no rows; check --dataset")
        if not rows:
            bad.finish(total)
            raise DataError(f"{spec}: none of its {total} rows can be used")
        for name in set(settings.columns) - recognised.given:
            lacking[name].append(spec.name)
        loaded.append(LoadedSource(spec, rows, total, recognised.line(spec.name, bad=len(bad.errors) - before)))
    for name, sources in lacking.items():
        if len(sources) == len(texts):
            raise DataError(f"--columns: no source has the column {name!r}; check its name")
    bad.finish(sum(source.num_read for source in loaded))
    for name, sources in lacking.items():
        if sources:
            logger.warning("%s: has no column %r of --columns", ", ".join(sources), name)
    return loaded


def read_part(part: Part, settings: ReadSettings, bad: BadRows, recognised: Recognised) -> Iterator[Row]:
    """The usable rows of one part, as they are read; the others go to `bad`."""

    def on_bad(error: DataError) -> None:
        recognised.num_read += 1
        bad.add(error)

    for raw in read_source(part.spec, part.split, on_bad):
        recognised.num_read += 1
        try:
            yield from make_rows(raw, part, settings, recognised)
        except DataError as error:
            bad.add(error)


def make_rows(raw: RawRow, part: Part, settings: ReadSettings, recognised: Recognised | None = None) -> list[Row]:
    """The rows of a raw one: one, or what a registered preprocessor makes of it.

    Raises:
        DataError: with file, line and field.
    """
    columns = {**part.columns, **settings.columns}
    return [
        normalise(one, columns, want=settings.want, auto=settings.auto, given=part.given, recognised=recognised, entry=part.entry)
        for one in _preprocessed(raw, part)
    ]


def _preprocessed(raw: RawRow, part: Part) -> list[RawRow]:
    if part.preprocess is None:
        return [raw]
    try:
        made = part.preprocess(dict(raw.data))
    except Exception as error:  # whatever a user's function raises
        raise DataError(f"{raw.where}: its preprocessor failed: {type(error).__name__}: {one_line(error)}; mend it, or the row") from error
    rows = [] if made is None else made if isinstance(made, list) else [made]
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{raw.where}: its preprocessor gave {got(made)}, wanted a row, a list of rows or None")
    return [RawRow(row, raw.source, raw.line) for row in rows]
