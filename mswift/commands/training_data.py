"""What a run trains on: sources read, turned into tokens and mixed, or streams that are read while it trains."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mswift.commands.session import reading
from mswift.commands.streams import lines, open_stream, positions
from mswift.commands.tokens import encode, encode_evaluation, make_batches, model_limit
from mswift.config import SftConfig
from mswift.errors import DataError
from mswift.log import get_logger

if TYPE_CHECKING:
    from mswift.commands.session import Session
    from mswift.data import LengthReport, TokenRows
    from mswift.data.batches import StepSource
    from mswift.data.loading import LoadedSource, ReadSettings
    from mswift.data.mixing import Mixture
    from mswift.data.rows import Row
    from mswift.data.stream_batches import StreamBatches
    from mswift.templates import RowEncoder

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows before they are tokens; none of `sources` with ``--streaming true``, or where all are cached."""

    sources: list[LoadedSource]
    train: list[Row]
    evaluation: list[Row]


class TrainingData(Protocol):
    """What a run trains and is evaluated on.

    Attributes:
        evaluation: tokens to evaluate on. said: what was recognised and what is mixed, for the user. report: what was dropped.
    """

    evaluation: TokenRows | None
    said: list[str]

    @property
    def report(self) -> LengthReport: ...

    def fingerprint(self) -> str:
        """Of the rows of every epoch."""

    def batches(self, config: SftConfig, session: Session, template: RowEncoder, *, hidden_size: int) -> tuple[StepSource, StepSource | None]:
        """To train on, and to evaluate on."""

    def notes(self, step: int) -> dict[str, object]:
        """What a checkpoint says of the position in the data."""

    def finish(self) -> None:
        """Says at the end of training what was left out; raises `DataError` where that was too much."""


@dataclass(slots=True)
class TrainingTokens:
    """Rows that are tokens before training begins. mixture: which rows an epoch has; None: every one once."""

    train: TokenRows
    evaluation: TokenRows | None
    mixture: Mixture | None
    said: list[str]

    @property
    def report(self) -> LengthReport:
        return self.train.report

    def fingerprint(self) -> str:
        mixed = "" if self.mixture is None else f"; {self.mixture.quotas} of {self.mixture.sizes}"
        return self.train.fingerprint() + mixed

    def batches(self, config: SftConfig, session: Session, template: RowEncoder, *, hidden_size: int) -> tuple[StepSource, StepSource | None]:
        train = make_batches(config, session, self.train, template, hidden_size=hidden_size, mixture=self.mixture)
        return train, _evaluation(config, session, self.evaluation, template, hidden_size)

    def notes(self, step: int) -> dict[str, object]:
        return {}

    def finish(self) -> None:
        return None


@dataclass(slots=True)
class TrainingStream:
    """Rows that are read while training goes on. names: of the entries of ``--dataset``."""

    stream: StreamBatches
    evaluation: TokenRows | None
    names: list[str]
    said: list[str]

    @property
    def report(self) -> LengthReport:
        return self.stream.report

    def fingerprint(self) -> str:
        return self.stream.plan.fingerprint()

    def batches(self, config: SftConfig, session: Session, template: RowEncoder, *, hidden_size: int) -> tuple[StepSource, StepSource | None]:
        return self.stream, _evaluation(config, session, self.evaluation, template, hidden_size)

    def notes(self, step: int) -> dict[str, object]:
        return {"rows_taken": positions(self.stream, self.names, step)}

    def finish(self) -> None:
        self.stream.finish()
        if self.report.num_dropped:
            logger.warning("left out on this rank: %s", ", ".join(self.report.lines()))


def _evaluation(config: SftConfig, session: Session, data: TokenRows | None, template: RowEncoder, hidden_size: int) -> StepSource | None:
    return None if data is None else make_batches(config, session, data, template, hidden_size=hidden_size, evaluation=True)


def open_data(config: SftConfig, session: Session, template: RowEncoder, rows: TrainingRows, output_dir: Path) -> TrainingData:
    """What a run trains on. Collective.

    Raises:
        DataError: no row is left, or a file cannot be read.
    """
    if not config.data.streaming:
        return _encode_training(config, template, rows, output_dir, session.directory)
    stream = open_stream(config, session, template, read_settings(config), limit=config.data.max_length or model_limit(session.directory))
    evaluation = encode_evaluation(config, template, rows.evaluation, session.directory)
    return TrainingStream(stream, evaluation, config.data.dataset, lines(stream, config.data.dataset))


def read_settings(config: SftConfig) -> ReadSettings:
    """How the rows of a run are read: as plain text by ``mswift pt``, else as conversations with answers."""
    from mswift.data.loading import ReadSettings

    known = reading(config)
    return ReadSettings(**{**known, "columns": known["columns"] or {}}, want="text" if config.verb == "pt" else "answer")


def read_training(config: SftConfig) -> TrainingRows:
    """All rows, but not those of a stream. A count (``#N``) that a source can meet is taken here, for good.

    Raises:
        DataError: a source cannot be read, or has too many bad rows.
    """
    import numpy as np

    from mswift.data import split
    from mswift.data.dataset import sample
    from mswift.data.loading import load_sources

    data, settings = config.data, read_settings(config)
    sources = load_sources(data.dataset, settings) if data.dataset and not data.streaming else []
    train: list[Row] = []
    for number, source in enumerate(sources):
        count = source.spec.count if source.spec.count is not None and source.spec.count <= len(source.rows) else None
        train += sample(source.rows, count, np.random.default_rng([data.data_seed, number]) if data.dataset_shuffle else None)
    if data.val_dataset:
        held_out = [row for source in load_sources(data.val_dataset, settings) for row in sample(source.rows, source.spec.count, None)]
        return TrainingRows(sources, train, held_out)
    return TrainingRows(sources, *split(train, data.split_dataset_ratio, data.data_seed))


def _encode_training(config: SftConfig, template: RowEncoder, rows: TrainingRows, output_dir: Path, directory: Path) -> TrainingTokens:
    """The rows as tokens, and how they are mixed.

    Raises:
        DataError: no row is left, of one of the sources or of all.
    """
    from mswift.data.mixing import EntryCounts, Mixture, quotas, shares_of, table

    data, counts = config.data, EntryCounts()
    train, evaluation = encode(config, template, rows.train, rows.evaluation, output_dir, directory, sink=counts)
    specs = [source.spec for source in rows.sources]
    sizes, tokens = ([found[i] for i in range(len(specs))] for found in (counts.rows, counts.tokens))
    shares = shares_of([spec.weight for spec in specs], data.shares())
    before = Counter(row.entry for row in rows.train)
    lost = next((spec for spec, size in zip(specs, sizes, strict=True) if not size), None)
    if lost is not None:
        raise DataError(f"{lost}: no row of it is left to train on: {', '.join(train.report.lines())}; raise --max_length or check the rows")
    asked = [_counted(source, size, before[i]) for i, (source, size) in enumerate(zip(rows.sources, sizes, strict=True))]
    wanted = quotas(asked, shares, data.stopping_strategy) if specs else []
    names = [str(spec) for spec in specs]
    if len(train) > sum(sizes):  # of cached data sets, which come last
        names.append("cached: " + ", ".join(config.packing.cached_dataset))
        tokens.append(train.num_tokens - sum(tokens))
        wanted.append(len(train) - sum(sizes))
        sizes.append(wanted[-1])
    mixture = Mixture(tuple(sizes), tuple(wanted), data.data_seed, data.dataset_shuffle, spread=shares is not None)
    held_out = f", {len(evaluation)} held out" if evaluation is not None else ""
    said = [source.line for source in rows.sources]
    said.append(f"data: {len(train)} rows, {train.num_tokens:,} tokens, longest {int(train.lengths.max())}{held_out}")
    if len(names) > 1 or not mixture.is_plain:
        said += table(names, mixture, tokens)
    if mixture.is_plain and not mixture.spread:
        return TrainingTokens(train, evaluation, None, said)
    if config.packing.packing:
        said.append("packing: the rows of the first epoch are those of every epoch")
        return TrainingTokens(train.choose(mixture.epoch(0)), evaluation, None, said)
    return TrainingTokens(train, evaluation, mixture, said)


def _counted(source: LoadedSource, size: int, before: int) -> int:
    """Rows that a source is asked for: those of its count beyond its length, less the share that could not be used."""
    count = source.spec.count
    if count is None or count <= len(source.rows) or not before:
        return size
    return max(1, round(count * size / before))
