"""Micro batches of a stream: each rank reads, normalises and tokenises the rows of its own lanes while the step before is computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mswift.data.batches import MicroBatch, collate
from mswift.data.encoded import TokenArrays, TokenRows, rows_of_arrays
from mswift.data.encoding import Truncation
from mswift.data.loading import ReadSettings
from mswift.data.report import LengthReport
from mswift.data.stream_reader import Share, StepRows, StreamReader
from mswift.data.stream_workers import Origin, Workers
from mswift.data.streaming import StreamPlan
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

    Args:
        workers: processes that read and tokenise for this rank, each the rows of lanes of its own; 0: this process does. Batches are the same.
        origin: where workers find what is registered.

    Attributes:
        report: what this rank kept, cut and dropped. num_read: rows that it has looked at. steps_per_epoch: as for `Batches`.
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
        workers: int = 0,
        origin: Origin | None = None,
    ) -> None:
        self.plan, self.shape, self.num_workers, self.origin = plan, shape, workers, origin
        self.global_batch_size, self.steps_per_epoch = plan.global_batch_size, plan.steps_per_epoch
        share = Share(shape.micro_batch_size, shape.dp_rank, shape.dp_size)
        self._reader = StreamReader(plan, template, reading, share, max_length, truncation)
        self._next, self._steps = -1, iter(list[list[StepRows]]())
        self._workers: Workers | None = None
        self.report, self.num_read, self.bad = LengthReport(max_length, truncation), 0, reading.bad_rows()

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro batches of global step ``k``; every rank has the same number of them. Steps in order are read ahead.

        Raises:
            DataError: a file cannot be read, or too many rows of this rank are bad.
        """
        shape = self.shape
        if k != self._next:
            self._start(k)
        self._next = k + 1
        data, members = self._joined(next(self._steps), len(self.plan.dealt(k, shape.micro_batch_size, shape.dp_size)[shape.dp_rank]))
        if self.num_read >= _TRUSTED_AFTER and len(self.bad.errors) > self.bad.max_share * self.num_read:
            self.bad.finish(self.num_read)
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
        """Ends the workers and says what was left out; raises `DataError` where that was too much."""
        self.close()
        self.bad.finish(self.num_read)

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        if self._workers is not None:
            self._workers.close()
        self._next, self._workers = -1, None

    def _start(self, k: int) -> None:
        self.close()
        if self.num_workers:
            self._workers = Workers(self._reader, self.num_workers, k, self.origin)
            self._steps = self._workers.steps()
        else:
            self._steps = ([step] for step in self._reader.steps(k))

    def _joined(self, parts: list[StepRows], count: int) -> tuple[TokenRows, list[list[int]]]:
        """The rows of a step in the order of their tickets, and which of them each of `count` micro batches has."""
        for part in parts:
            self.report.merge(part.report)
            self.num_read += part.num_read
            for fault in part.faults:
                self.bad.add(DataError(fault))
            if part.error is not None:
                raise part.error
        tokens = sorted((row for part in parts for row in part.tokens), key=lambda row: row[0])
        members: list[list[int]] = [[] for _ in range(count)]
        for index, (place, _, _) in enumerate(tokens):
            members[place // self.shape.micro_batch_size].append(index)
        lengths = np.asarray([len(ids) for _, ids, _ in tokens], np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for _, ids, _ in tokens)])
        weights = np.concatenate([np.zeros(0, np.float32), *(weights for _, _, weights in tokens)])
        return rows_of_arrays(TokenArrays(ids, weights, [], np.zeros((len(tokens), 2), np.int64)), lengths, self.report), members
