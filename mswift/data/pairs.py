"""Preference rows as tokens: the chosen and the rejected conversation of a row are neighbours, and neither is ever there without the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mswift.data.cache import load_cached
from mswift.data.encoded import Integers, MemorySink, TokenRows, TokenSink
from mswift.data.encoding import Progress, encode_chunks, to_conversation
from mswift.data.report import LengthReport
from mswift.data.rows import BadRows, Row
from mswift.errors import DataError
from mswift.templates import Conversation, EncodedChunk, RowEncoder

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Two training rows for each row of preferences.

    Attributes:
        data: training row 2i is the chosen, 2i + 1 the rejected conversation of pair i.
        groups: int64 ``[pairs + 1]``, where each pair begins, as `PackIndex` and `Batches` take it.
    """

    data: TokenRows
    groups: Integers

    def __len__(self) -> int:
        return len(self.groups) - 1


def encode_pairs(
    rows: Iterable[Row],
    template: RowEncoder,
    *,
    max_length: int | None = None,
    truncation: Literal["delete", "left", "right"] = "delete",
    num_proc: int = 1,
    progress: Progress | None = None,
    strict: bool = False,
    max_bad_share: float = 0.01,
    sink: TokenSink | None = None,
) -> EncodedPairs:
    """Tokenises both conversations of all rows. Of a conversation that becomes several training rows the last one counts, which has the answer.

    Args:
        max_length: tokens that each of the two may have; ``None`` = any number. truncation: what happens to a pair with a longer one: ``delete``
            drops both, ``right`` and ``left`` keep the first or last tokens of the longer one.
        num_proc, progress, strict, max_bad_share: as in `encode_dataset`. sink: what takes the training rows; None: memory.

    Raises:
        DataError: a row has one answer only, too many rows are refused by the template, or no pair is left.
    """
    report, bad, sink = LengthReport(max_length, truncation), BadRows(strict=strict, max_share=max_bad_share), MemorySink() if sink is None else sink
    total, done = len(rows) if isinstance(rows, Sized) else 0, 0
    for origins, chunk in encode_chunks(rows, template, num_proc, lambda some: [conversation for row in some for conversation in both(row)]):
        for number, row in enumerate(origins):
            refused = next((chunk.refused[side] for side in (2 * number, 2 * number + 1) if side in chunk.refused), None)
            if refused is not None:
                bad.add(DataError(f"{row.where}: {refused}"))
                report.refused(row.source, row.line, refused)
        _take(chunk, origins, report, sink)
        done += len(origins)
        if progress is not None:
            progress(done, total)
    bad.finish(done)
    if not report.num_kept:
        raise DataError(report.nothing_left(None))
    return _pairs(sink.finish(report))


def load_pairs(names: Sequence[str], *, part: str = "train", seed: int = 42, shuffle: bool = True) -> EncodedPairs:
    """The preference rows of cached data sets; ``DIR#N`` takes N of one, as `load_cached` takes rows.

    Raises:
        DataError: one is missing or damaged, or holds no pairs.
    """
    return _pairs(load_cached(names, part=part, seed=seed, shuffle=shuffle, mode="rlhf"))


def _pairs(data: TokenRows) -> EncodedPairs:
    return EncodedPairs(data, np.arange(0, len(data) + 1, 2))


def both(row: Row) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a row. Raises `DataError` where one is missing."""
    if row.rejected is None:
        raise DataError(f"{row.where}: the rejected answer is missing, wanted a row with two answers")
    chosen = to_conversation(row)
    return chosen, Conversation(row.rejected, chosen.tools, chosen.kwargs)


def _take(chunk: EncodedChunk, rows: list[Row], report: LengthReport, sink: TokenSink) -> None:
    """Pairs of which both fit go to the sink, side by side."""
    ends = np.cumsum(chunk.lengths)
    last = dict(zip(chunk.origins.tolist(), zip((ends - chunk.lengths).tolist(), ends.tolist(), strict=True), strict=True))
    parts: list[slice] = []
    origins: list[Row] = []
    for number, row in enumerate(rows):
        sides = [last.get(2 * number), last.get(2 * number + 1)]
        if sides[0] is None or sides[1] is None:
            continue
        pair = _fit(row, [side for side in sides if side is not None], chunk, report)
        parts += pair
        origins += [row] * len(pair)
    if parts:
        ids, weights = (np.concatenate([array[part] for part in parts]) for array in (chunk.ids, chunk.weights))
        sink.add(ids, weights, np.asarray([part.stop - part.start for part in parts], np.int64), origins)


def _fit(row: Row, sides: list[tuple[int, int]], chunk: EncodedChunk, report: LengthReport) -> list[slice]:
    """Where the two training rows of a pair lie; nothing where one of them does not fit or has nothing to train."""
    longest = max(end - start for start, end in sides)
    limit = longest if report.max_length is None else report.max_length
    if longest > limit and report.truncation == "delete":
        report.too_long(row.source, row.line, longest)
        return []
    cut = [slice(start, min(end, start + limit)) if report.truncation != "left" else slice(max(start, end - limit), end) for start, end in sides]
    if not all(chunk.weights[part][1:].any() for part in cut):
        report.nothing_to_train(row.source, row.line, longest)
        return []
    report.kept(row.source, longest)
    return cut
