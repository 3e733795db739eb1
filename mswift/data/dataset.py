"""Sources to normalised rows: read, sampled, split. Nothing is dropped without being named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mswift.data.loading import ReadSettings, load_sources
from mswift.data.rows import Row, Want
from mswift.errors import DataError
from mswift.log import get_logger

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
    auto: bool = True,
    use_hf: bool | None = None,
) -> list[Row]:
    """Reads, normalises and samples all sources, one after the other.

    ``#N`` takes a random sample of N rows by ``seed``; N beyond the length is whole passes and a sample for the rest. Without ``shuffle``
    it takes the first N rows of as many passes as it needs. The order of training is not made here but by `Batches`.

    Args:
        columns: column names of the sources to the names of `normalise`.
        strict: the first bad row is an error; else at most ``max_bad_share`` of all rows may be bad, and they are listed in a warning.
        want: what the rows are for. auto: whether other usual names of columns are understood; see `normalise`.
        use_hf: where a plain ``org/name`` lives; see `parse_spec`.

    Raises:
        DataError: no source, a source without rows, one that cannot be read, too many bad rows.
    """
    settings = ReadSettings(columns or {}, want, auto, strict, max_bad_share, use_hf)
    rows: list[Row] = []
    for number, source in enumerate(load_sources(specs, settings)):
        rows += sample(source.rows, source.spec.count, np.random.default_rng([seed, number]) if shuffle else None)
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


def sample(rows: list[Row], count: int | None, rng: np.random.Generator | None) -> list[Row]:
    """`count` of the rows: whole passes and a random choice for the rest, or the first ones without `rng`; None for all as they are."""
    if count is None:
        return rows
    passes, rest = divmod(count, len(rows))
    chosen = range(rest) if rng is None else rng.permutation(len(rows))[:rest].tolist()
    return rows * passes + [rows[i] for i in chosen]
