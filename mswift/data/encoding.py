"""Normalised rows to token ids and weights, in as many processes as are wanted, cut to length, with a report of what did not fit."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from mswift.data.encoded import MemorySink, TokenRows, TokenSink, TokenTaker
from mswift.data.report import LengthReport
from mswift.data.rows import BadRows, Row
from mswift.errors import DataError
from mswift.templates import Conversation, EncodedChunk, RowEncoder

Truncation: TypeAlias = Literal["delete", "left", "right", "split"]
Progress: TypeAlias = Callable[[int, int], None]

_CHUNK = 1024  # rows that are tokenised together
_AHEAD = 4  # chunks that wait for each process


def encode_dataset(
    rows: Iterable[Row],
    template: RowEncoder,
    *,
    max_length: int | None = None,
    truncation: Truncation = "delete",
    num_proc: int = 1,
    progress: Progress | None = None,
    report_dir: str | Path | None = None,
    strict: bool = False,
    max_bad_share: float = 0.01,
    sink: TokenSink | None = None,
) -> TokenRows:
    """Tokenises all rows; a conversation becomes one training row, or one per turn where `ChatTemplate.encode_rows` says so.

    Args:
        max_length: tokens that a row may have; ``None`` = any number.
        truncation: what happens to a longer row: ``delete`` drops it, ``right`` keeps its first tokens, ``left`` its last, ``split`` cuts it into
            rows of `max_length` and one for the rest. A row with nothing left to train is dropped as well.
        num_proc: worker processes; the tokenizer uses all cores in one process already.
        progress: called with (rows done, all rows; 0: not known).
        report_dir: an existing or new directory that gets ``dropped_rows.txt`` (place and reason, a row a line) when any row was dropped.
        strict, max_bad_share: as in `load_dataset`, for rows that the template refuses.
        sink: what takes the rows; None: memory.

    Raises:
        DataError: too many rows are refused by the template, or no row is left; with the counts and the file of the row numbers.
    """
    report = LengthReport(max_length, truncation)
    bad = BadRows(strict=strict, max_share=max_bad_share)
    sink = MemorySink() if sink is None else sink
    total, done = len(rows) if isinstance(rows, Sized) else 0, 0
    for origins, chunk in encode_chunks(rows, template, num_proc):
        take(chunk, origins, report, bad, sink)
        done += len(origins)
        if progress is not None:
            progress(done, total)
    path = _write_report(report, Path(report_dir)) if report_dir is not None else None
    bad.finish(done)
    if not report.num_kept:
        raise DataError(report.nothing_left(path))
    return sink.finish(report)


def _write_report(report: LengthReport, directory: Path) -> Path | None:
    try:
        return report.write(directory)
    except OSError as error:
        raise DataError(f"the list of the {report.num_dropped} dropped rows cannot be written to {directory}: {error.strerror}; mend that") from None


def to_conversation(row: Row) -> Conversation:
    """What a template gets of a row: messages, tools, and the variables of its column ``chat_template_kwargs``."""
    kwargs = row.columns.get("chat_template_kwargs")
    return Conversation(row.messages, row.tools or (), kwargs if isinstance(kwargs, dict) else {})


# ---- tokens ----------------------------------------------------------------------------------------------------------------------------------


def encode_chunk(template: RowEncoder, conversations: Sequence[Conversation]) -> EncodedChunk:
    """Some rows with one call of the tokenizer."""
    return next(template.encode_chunks([conversations]))


def one_each(rows: Sequence[Row]) -> list[Conversation]:
    """The conversation of each row."""
    return [to_conversation(row) for row in rows]


def encode_chunks(
    rows: Iterable[Row], template: RowEncoder, num_proc: int, conversations: Callable[[Sequence[Row]], list[Conversation]] = one_each
) -> Iterator[tuple[list[Row], EncodedChunk]]:
    """Chunks of rows with what became of them, in order; only so many are held as keep the processes busy.

    Args:
        conversations: what is encoded of some rows.
    """
    with _rows_left_alone():
        yield from _encode_chunks(rows, template, num_proc, conversations)


@contextlib.contextmanager
def _rows_left_alone() -> Iterator[None]:
    """Python's collector does not go through all rows again, of which there may be millions, while other objects come and go."""
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not before:  # what somebody else has frozen stays so
            gc.unfreeze()


def _encode_chunks(
    rows: Iterable[Row], template: RowEncoder, num_proc: int, conversations: Callable[[Sequence[Row]], list[Conversation]]
) -> Iterator[tuple[list[Row], EncodedChunk]]:
    source = iter(rows)
    chunks = iter(lambda: list(itertools.islice(source, _CHUNK)), [])
    if num_proc <= 1 or (isinstance(rows, Sized) and len(rows) <= _CHUNK):
        held: deque[list[Row]] = deque()

        def asked() -> Iterator[list[Conversation]]:
            for chunk in chunks:
                held.append(chunk)
                yield conversations(chunk)

        for made in template.encode_chunks(asked()):
            yield held.popleft(), made
        return
    with ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, (template,)) as pool:
        waiting: deque[tuple[list[Row], Future[EncodedChunk]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, conversations(chunk))))
            if len(waiting) > _AHEAD * num_proc:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


_worker: list[RowEncoder] = []  # one a process: sending the tokenizer with every chunk would cost more than encoding it


def _start_worker(template: RowEncoder) -> None:
    _worker[:] = [template]


def _work(conversations: Sequence[Conversation]) -> EncodedChunk:
    return encode_chunk(_worker[0], conversations)


# ---- lengths ---------------------------------------------------------------------------------------------------------------------------------


def take(chunk: EncodedChunk, rows: Sequence[Row], report: LengthReport, bad: BadRows, sink: TokenTaker) -> None:
    """What fits goes to the sink, and what became of each row into the report."""
    starts = np.cumsum(chunk.lengths) - chunk.lengths
    trained = chunk.weights != 0
    trained[starts] = False  # nothing predicts the first token of a row
    fits = report.max_length is None or bool((chunk.lengths <= report.max_length).all())
    if fits and not chunk.refused and np.logical_or.reduceat(trained, starts).all():
        origins = [rows[number] for number in chunk.origins.tolist()]
        report.kept_whole(origins, chunk.lengths)
        sink.add(chunk.ids, chunk.weights, chunk.lengths, origins)
        return
    for number, reason in chunk.refused.items():
        bad.add(DataError(f"{rows[number].where}: {reason}"))
    parts: list[tuple[Row, slice]] = []
    made = dict[int, list[int]]()
    for index, number in enumerate(chunk.origins.tolist()):
        made.setdefault(number, []).append(index)
    for number, row in enumerate(rows):
        if number in chunk.refused:
            report.refused(row.source, row.line, chunk.refused[number])
        for index in made.get(number, ()):
            start = int(starts[index])
            fitted = _fit(row, trained[start : start + int(chunk.lengths[index])], report)
            parts += [(row, slice(start + part.start, start + part.stop)) for part in fitted]
    if parts:
        ids, weights = (np.concatenate([array[part] for _, part in parts]) for array in (chunk.ids, chunk.weights))
        sink.add(ids, weights, np.asarray([part.stop - part.start for _, part in parts], np.int64), [row for row, _ in parts])


def _fit(row: Row, trained: np.ndarray, report: LengthReport) -> list[slice]:
    """The parts of a training row that are kept; `trained` says which of its tokens are predicted and count."""
    length, limit = len(trained), report.max_length
    if limit is None or length <= limit:
        parts = [slice(0, length)]
    elif report.truncation == "delete":
        report.too_long(row.source, row.line, length)
        return []
    elif report.truncation == "split":
        parts = [slice(start, min(start + limit, length)) for start in range(0, length, limit)]
    else:
        parts = [slice(0, limit) if report.truncation == "right" else slice(length - limit, length)]
    kept = [part for part in parts if trained[part][1:].any()]
    if not kept:
        report.nothing_to_train(row.source, row.line, length)
    elif len(parts) > 1:
        report.cut(row.source, row.line, length, len(kept), len(parts))
    else:
        report.kept(row.source, length)
    return kept
