"""Micro batches of a stream: each rank reads, normalises and tokenises the rows of its own lanes while the step before is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mswift.data.batches import MicroBatch, collate
from mswift.data.encoded import EncodedDataset, Ids, Integers, TokenRows, Weights
from mswift.data.encoding import Truncation, encode_chunk, take, to_conversation
from mswift.data.files import RawRow
from mswift.data.loading import ReadSettings, make_rows
from mswift.data.report import LengthReport
from mswift.data.rows import Recognised, Row
from mswift.data.streaming import StreamPlan, Ticket
from mswift.errors import DataError
from mswift.templates import RowEncoder

_TRUSTED_AFTER = 1000  # rows: before that one bad row says nothing about a share


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How rows of a step become tensors of this rank; see `Batches`."""

    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    pad_token_id: int = 0
    pad_to_multiple: int = 1
    padding_free: bool = False


class StreamBatches:
    """This rank's micro batches of every step of a plan.

    A row that cannot be used, or is too long, leaves its place empty: the loss is a sum over the tokens of the whole global batch, so the rows
    of a step stay the same whatever becomes of them. A conversation of several training rows stays in one micro batch.

    Attributes:
        report: what this rank kept, cut and dropped. recognised: what it understood of the sources.
        steps_per_epoch: as for `Batches`.
    """

    def __init__(
        self,
        plan: StreamPlan,
        template: RowEncoder,
        reading: ReadSettings,
        shape: BatchShape,
        *,
        max_length: int | None = None,
        truncation: Truncation = "delete",
    ) -> None:
        self.plan, self.template, self.reading, self.shape = plan, template, reading, shape
        self.global_batch_size, self.steps_per_epoch = plan.global_batch_size, plan.steps_per_epoch
        self.report, self.recognised, self.bad = LengthReport(max_length, truncation), Recognised(), reading.bad_rows()

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro batches of global step ``k``; every rank has the same number of them.

        Raises:
            DataError: a file cannot be read, or too many rows of this rank are bad.
        """
        shape = self.shape
        dealt = self.plan.dealt(k, shape.micro_batch_size, shape.dp_size)[shape.dp_rank]
        rows, owners = list[Row](), dict[int, int]()
        for number, tickets in enumerate(dealt):
            for row in self._rows(tickets):
                owners[id(row)] = number
                rows.append(row)
        data, members = self._encode(rows, owners, len(dealt))
        if self.recognised.num_read >= _TRUSTED_AFTER and len(self.bad.errors) > self.bad.max_share * self.recognised.num_read:
            self.bad.finish(self.recognised.num_read)
        return [
            collate(
                data,
                chosen,
                number * shape.dp_size + shape.dp_rank,
                pad_token_id=shape.pad_token_id,
                pad_to_multiple=shape.pad_to_multiple,
                end_to_end=shape.padding_free,
            )
            for number, chosen in enumerate(members)
        ]

    def finish(self) -> None:
        """Says what was left out; raises `DataError` where that was too much."""
        self.bad.finish(self.recognised.num_read)

    def _rows(self, tickets: Sequence[Ticket]) -> list[Row]:
        rows: list[Row] = []
        for ticket in tickets:
            source = self.plan.sources[ticket.source]
            item, owner = source.item(ticket.number)
            self.recognised.num_read += item is not None
            try:
                if isinstance(item, DataError):
                    raise item
                if isinstance(item, RawRow):
                    rows += make_rows(item, source.shards[owner].part, self.reading, self.recognised)
            except DataError as error:
                self.bad.add(error)
        return rows

    def _encode(self, rows: list[Row], owners: dict[int, int], count: int) -> tuple[TokenRows, list[list[int]]]:
        """The rows as tokens, and which of them each micro batch has."""
        sink = _Kept()
        if rows:
            take(encode_chunk(self.template, [to_conversation(row) for row in rows]), rows, self.report, self.bad, sink)
        members: list[list[int]] = [[] for _ in range(count)]
        for index, row in enumerate(sink.origins):
            members[owners[id(row)]].append(index)
        return EncodedDataset(sink.encoded, sink.origins, self.report), members


class _Kept:
    """Rows of one step with what they were made from."""

    def __init__(self) -> None:
        self.encoded: list[tuple[Ids, Weights]] = []
        self.origins: list[Row] = []

    def add(self, ids: Ids, weights: Weights, lengths: Integers, origins: Sequence[Row]) -> None:
        ends = np.cumsum(lengths)[:-1]
        self.encoded += list(zip(np.split(ids, ends), np.split(weights, ends), strict=True))
        self.origins += origins

    def finish(self, report: LengthReport) -> TokenRows:
        return EncodedDataset(self.encoded, self.origins, report)
