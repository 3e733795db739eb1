"""The rows of a stream as tokens, one step after the other: what a rank reads for itself, or one of the processes that read for it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mswift.data.encoded import Ids, Integers, Weights
from mswift.data.encoding import Truncation, take, to_conversation
from mswift.data.files import RawRow
from mswift.data.loading import ReadSettings, make_rows
from mswift.data.report import LengthReport
from mswift.data.rows import BadRows, Row
from mswift.data.streaming import StreamPlan
from mswift.errors import DataError
from mswift.templates import EncodedChunk, RowEncoder


@dataclass(frozen=True, slots=True)
class Share:
    """Which rows of every step are read: those of a rank, or of these those of some lanes.

    Args:
        worker, workers: which of how many processes that read for the rank; lanes are dealt out among them.
    """

    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    worker: int = 0
    workers: int = 1


@dataclass(slots=True)
class StepRows:
    """What became of the rows of a step.

    Attributes:
        tokens: of each training row the place of its ticket among those of the rank, its ids and its weights.
        report, faults, num_read: of these rows. error: why the stream ends here.
    """

    report: LengthReport
    faults: list[str] = field(default_factory=list)
    num_read: int = 0
    tokens: list[tuple[int, Ids, Weights]] = field(default_factory=list)
    error: DataError | None = None


@dataclass(slots=True)
class _Read:
    """Rows of a step before they are tokens. places: of their tickets among those of the rank."""

    step: StepRows
    rows: list[Row] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class StreamReader:
    """Reads, normalises and tokenises the rows of a share.

    Args:
        max_length, truncation: as in `encode_dataset`.
    """

    def __init__(
        self, plan: StreamPlan, template: RowEncoder, reading: ReadSettings, share: Share, max_length: int | None, truncation: Truncation
    ) -> None:
        self.plan, self.template, self.reading, self.share = plan, template, reading, share
        self.max_length, self.truncation = max_length, truncation

    def steps(self, start: int) -> Iterator[StepRows]:
        """Those from `start` on, without end; some are read ahead, so that the tokenizer works on one while the next is read."""
        held: deque[_Read] = deque()

        def rows() -> Iterator[list[Row]]:
            for k in itertools.count(start):
                held.append(self._read(k))
                yield held[-1].rows
                if held and held[-1].step.error is not None:
                    return

        for chunk in self.template.encode_chunks([to_conversation(row) for row in some] for some in rows()):
            yield self._finish(held.popleft(), chunk)

    def _read(self, k: int) -> _Read:
        read, share = _Read(StepRows(LengthReport(self.max_length, self.truncation))), self.share
        tickets = itertools.chain.from_iterable(self.plan.dealt(k, share.micro_batch_size, share.dp_size)[share.dp_rank])
        for place, ticket in enumerate(tickets):
            if self.plan.lane(ticket) // share.dp_size % share.workers != share.worker:
                continue
            source = self.plan.sources[ticket.source]
            try:
                item, owner = source.item(ticket.number)
            except DataError as error:
                read.step.error = error
                return read
            read.step.num_read += item is not None
            try:
                if isinstance(item, DataError):
                    raise item
                made = make_rows(item, source.shards[owner].part, self.reading) if isinstance(item, RawRow) else []
            except DataError as error:
                read.step.faults.append(str(error))
                continue
            read.rows += made
            read.places += [place] * len(made)
        return read

    def _finish(self, read: _Read, chunk: EncodedChunk) -> StepRows:
        step, sink, bad = read.step, _Kept(read), BadRows()
        if read.rows:
            take(chunk, read.rows, step.report, bad, sink)
        step.faults += bad.errors
        return step


class _Kept:
    """Takes training rows with the places of their tickets."""

    def __init__(self, read: _Read) -> None:
        self._step = read.step
        self._places = {id(row): place for row, place in zip(read.rows, read.places, strict=True)}

    def add(self, ids: Ids, weights: Weights, lengths: Integers, origins: Sequence[Row]) -> None:
        ends = np.cumsum(lengths)[:-1]
        places = [self._places[id(row)] for row in origins]
        self._step.tokens += zip(places, np.split(ids, ends), np.split(weights, ends), strict=True)
