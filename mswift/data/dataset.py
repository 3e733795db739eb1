"""Sources to normalised rows, rows to a compact encoded data set, and a report of what did not fit. Nothing is dropped without being named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.data.report import LengthReport
from mswift.data.rows import BadRows, Row, Want, normalise
from mswift.data.sources import SourceSpec, parse_spec, read_source
from mswift.errors import DataError
from mswift.log import get_logger
from mswift.templates import ChatTemplate, Conversation, Encoded

Truncation: TypeAlias = Literal["delete", "left", "right"]
Progress: TypeAlias = Callable[[int, int], None]

_CHUNK = 256  # rows that are tokenised together

logger = get_logger("mswift.data.dataset")


def load_dataset(
    specs: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 42,
    shuffle: bool = True,
    strict: bool = False,
    max_bad_share: float = 0.01,
    want: Want = "answer",
    use_hf: bool | None = None,
) -> list[Row]:
    """Reads, normalises and samples all sources, one after the other.

    ``#N`` takes a random sample of N rows by ``seed``; N beyond the length is whole passes and a sample for the rest. Without ``shuffle``
    it takes the first N rows of as many passes as it needs. The order of training is not made here but by `Batches`.

    Args:
        columns: column names of the sources to the names of `normalise`.
        strict: the first bad row is an error; else at most ``max_bad_share`` of all rows may be bad, and they are listed in a warning.
        want: what the rows are for; see `normalise`.
        use_hf: where a plain ``org/name`` lives; see `parse_spec`.

    Raises:
        DataError: no source, a source without rows, one that cannot be read, too many bad rows.
    """
    if not specs:
        raise DataError("no data: wanted at least one --dataset, such as --dataset data/train.jsonl")
    bad = BadRows(strict=strict, max_share=max_bad_share)
    rows: list[Row] = []
    total = 0
    for number, spec in enumerate(parse_spec(text, use_hf=use_hf) for text in specs):
        found, num_read = _read_rows(spec, bad, columns, want)
        total += num_read
        rows += _sample(found, spec.count, np.random.default_rng([seed, number]) if shuffle else None)
    bad.finish(total)
    return rows


def split(rows: Sequence[Row], ratio: float, seed: int = 42) -> tuple[list[Row], list[Row]]:
    """Takes a random ``ratio`` of the rows (at least one, and leaving at least one) for validation; both parts keep the order.

    Returns:
        ``(train, validation)``; validation is empty where ``ratio`` is 0.

    Raises:
        DataError: ``ratio`` is outside [0, 1), or there are fewer than two rows to split.
    """
    if not 0 <= ratio < 1:
        raise DataError(f"--split_dataset_ratio is {ratio}, wanted at least 0 and less than 1")
    if ratio == 0:
        return list(rows), []
    if len(rows) < 2:
        raise DataError(f"--split_dataset_ratio {ratio}: there is {len(rows)} row, wanted at least 2; give a --val_dataset or set the ratio to 0")
    num_val = min(max(round(len(rows) * ratio), 1), len(rows) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:num_val].tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


class EncodedDataset:
    """Training rows end to end in flat arrays: int32 ids, float32 weights, int64 offsets, and where each came from.

    Attributes:
        lengths: int64 ``[len]``, tokens of each row.
        report: what was kept, cut and dropped.
    """

    def __init__(self, encoded: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]], rows: Sequence[Row], report: LengthReport) -> None:
        """``rows[i]`` is the row that ``encoded[i]`` was made from."""
        self.lengths: npt.NDArray[np.int64] = np.asarray([len(ids) for ids, _ in encoded], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._ids = np.concatenate([ids for ids, _ in encoded]) if encoded else np.empty(0, np.int32)
        self._weights = np.concatenate([weights for _, weights in encoded]) if encoded else np.empty(0, np.float32)
        names = {source: i for i, source in enumerate(dict.fromkeys(row.source for row in rows))}
        self._sources = list(names)
        self._places = np.asarray([(names[row.source], row.line) for row in rows], dtype=np.int64).reshape(-1, 2)
        self.report = report

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        ids, weights = self.arrays(index)
        return Encoded(ids.tolist(), weights.tolist())

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    def arrays(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Ids and weights of row ``index``, without a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = slice(self._offsets[index], self._offsets[index + 1])
        return self._ids[part], self._weights[part]

    def where(self, index: int) -> str:
        """File and line that row ``index`` was made from."""
        source, line = self._places[index]
        return f"{self._sources[source]}:{line}"

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    def fingerprint(self) -> str:
        """SHA-256 over tokens, weights and row limits: equal for equal training rows in equal order."""
        digest = hashlib.sha256(self._ids.tobytes())
        digest.update(self._weights.tobytes())
        digest.update(self._offsets.tobytes())
        return digest.hexdigest()


def encode_dataset(
    rows: Sequence[Row],
    template: ChatTemplate,
    *,
    max_length: int | None = None,
    truncation: Truncation = "delete",
    num_proc: int = 1,
    progress: Progress | None = None,
    report_dir: str | Path | None = None,
    strict: bool = False,
    max_bad_share: float = 0.01,
) -> EncodedDataset:
    """Tokenises all rows; a conversation becomes one training row, or one per turn where `ChatTemplate.encode_rows` says so.

    Args:
        max_length: tokens that a row may have; ``None`` = any number.
        truncation: what happens to a longer row: ``delete`` drops it, ``right`` keeps its first tokens, ``left`` its last. A row with
            nothing left to train is dropped as well.
        num_proc: worker processes; the tokenizer uses all cores in one process already.
        progress: called with (rows done, all rows).
        report_dir: an existing or new directory that gets ``dropped_rows.txt`` (place and reason, a row a line) when any row was dropped.
        strict, max_bad_share: as in `load_dataset`, for rows that the template refuses.

    Raises:
        DataError: too many rows are refused by the template, or no row is left; with the counts and the file of the row numbers.
    """
    report = LengthReport(max_length, truncation)
    bad = BadRows(strict=strict, max_share=max_bad_share)
    encoded: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = []
    origins: list[Row] = []
    for done, (row, result) in enumerate(zip(rows, _encode_all(rows, template, num_proc), strict=True), start=1):
        if isinstance(result, DataError):
            bad.add(DataError(f"{row.where}: {result}"))
            report.refused(row.source, row.line, str(result))
        else:
            for made in result:
                fitted = _fit(made, row, report)
                if fitted is not None:
                    encoded.append((np.asarray(fitted.input_ids, np.int32), np.asarray(fitted.weights, np.float32)))
                    origins.append(row)
        if progress is not None and (done % _CHUNK == 0 or done == len(rows)):
            progress(done, len(rows))
    path = _write_report(report, Path(report_dir)) if report_dir is not None else None
    bad.finish(len(rows))
    if not encoded:
        raise DataError(report.nothing_left(path))
    return EncodedDataset(encoded, origins, report)


def _write_report(report: LengthReport, directory: Path) -> Path | None:
    try:
        return report.write(directory)
    except OSError as error:
        raise DataError(f"the list of the {report.num_dropped} dropped rows cannot be written to {directory}: {error.strerror}; mend that") from None


def _read_rows(spec: SourceSpec, bad: BadRows, columns: Mapping[str, str] | None, want: Want) -> tuple[list[Row], int]:
    rows: list[Row] = []
    total = 0
    for raw in read_source(spec):
        total += 1
        try:
            rows.append(normalise(raw, columns, want=want))
        except DataError as error:
            bad.add(error)
    if not total:
        raise DataError(f"{spec}: holds no rows; check --dataset")
    if not rows:
        bad.finish(total)
        raise DataError(f"{spec}: none of its {total} rows can be used")
    return rows, total


def _sample(rows: list[Row], count: int | None, rng: np.random.Generator | None) -> list[Row]:
    if count is None:
        return rows
    passes, rest = divmod(count, len(rows))
    chosen = range(rest) if rng is None else rng.permutation(len(rows))[:rest].tolist()
    return rows * passes + [rows[i] for i in chosen]


def to_conversation(row: Row) -> Conversation:
    """What a template gets of a row: messages, tools, and the variables of its column ``chat_template_kwargs``."""
    kwargs = row.columns.get("chat_template_kwargs")
    return Conversation(row.messages, row.tools or (), kwargs if isinstance(kwargs, dict) else {})


def _encode_all(rows: Sequence[Row], template: ChatTemplate, num_proc: int) -> Iterator[list[Encoded] | DataError]:
    chunks = ([to_conversation(row) for row in rows[i : i + _CHUNK]] for i in range(0, len(rows), _CHUNK))
    if num_proc <= 1 or len(rows) <= _CHUNK:
        yield from chain.from_iterable(map(template.encode_batch, chunks))
        return
    with ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, (template,)) as pool:
        yield from chain.from_iterable(pool.map(_work, chunks))


_worker: list[ChatTemplate] = []  # one a process: sending the tokenizer with every chunk would cost more than encoding it


def _start_worker(template: ChatTemplate) -> None:
    _worker[:] = [template]


def _work(conversations: Sequence[Conversation]) -> list[list[Encoded] | DataError]:
    return _worker[0].encode_batch(conversations)


def _fit(made: Encoded, row: Row, report: LengthReport) -> Encoded | None:
    length, limit = len(made), report.max_length
    if limit is not None and length > limit:
        if report.truncation == "delete":
            report.too_long(row.source, row.line, length)
            return None
        kept = slice(limit) if report.truncation == "right" else slice(length - limit, None)
        made = Encoded(made.input_ids[kept], made.weights[kept])
    if not any(made.weights[1:]):
        report.nothing_to_train(row.source, row.line, length)
        return None
    report.kept(row.source, length)
    return made
